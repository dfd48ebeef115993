"""The neural ODE in CasADi: dense matrices (MX), time is a mapaccum; ode by CVODES, and by steps on the graph."""

import casadi as ca
import numpy as np

from backends.casadi_backend import numbers
from problems import Implementation
from problems.neural_ode import MOST_STEPS, SAVES, T, attempts, dopri5, first_step


def f(u, W1, b1, W2, b2):
    """The network, u (2, b)."""
    many = u.shape[1]
    z = ca.tanh(ca.mtimes(W1, u * u * u) + ca.repmat(b1, 1, many))
    return ca.mtimes(W2, z) + ca.repmat(b2, 1, many)


def rhs(theta, data, size):
    return ca.dot(data["v"], f(theta["u"], theta["W1"].T, theta["b1"], theta["W2"].T, theta["b2"]))


def step(dt, net, b):
    """The step as a function that can be repeated: its inputs are the state and the weights."""
    u = ca.MX.sym("u", 2, b)
    net = [ca.MX.sym("net", *block.shape) for block in net]
    k1 = f(u, *net)
    k2 = f(u + dt / 2 * k1, *net)
    k3 = f(u + dt / 2 * k2, *net)
    k4 = f(u + dt * k3, *net)
    return ca.Function("step", [u, *net], [u + dt / 6 * (k1 + 2 * (k2 + k3) + k4)])


def rk4(theta, data, size):
    u0, target = data["u0"], data["target"]  # (2, b), (2, 30)
    net = theta["W1"].T, theta["b1"], theta["W2"].T, theta["b2"]
    steps = (SAVES - 1) * size.m
    each = step(T / (SAVES - 1) / size.m, net, size.b)
    u = each.mapaccum(steps)(u0, *(ca.repmat(block, 1, steps) for block in net))  # (2, b steps)
    saved = [u0, *ca.horzsplit(u, size.b)[size.m - 1 :: size.m]]
    return ca.sumsqr(ca.horzcat(*saved) - ca.kron(target, ca.DM.ones(1, size.b)))


# ode: the batch takes steps together


def ode(theta, data, size, solved=lambda solver: None):
    """CVODES (Hindmarsh et al., ACM TOMS 31 (2005) 363): Adams' method, of variable order; functional iteration, because nothing
    is stiff. Its gradient is the adjoint equation, solved on the interpolated solution, or sensitivities, integrated beside."""
    u0, b = data["u0"], size.b
    blocks = theta["W1"].T, theta["b1"], theta["W2"].T, theta["b2"]
    u, p = ca.MX.sym("u", 2 * b), ca.MX.sym("p", sum(block.numel() for block in blocks))
    ends = np.cumsum([0, *(block.numel() for block in blocks)]).tolist()
    net = [ca.reshape(part, *block.shape) for part, block in zip(ca.vertsplit(p, ends), blocks, strict=True)]
    options = {"reltol": size.rtol, "abstol": size.atol, "max_num_steps": MOST_STEPS}
    options |= {"linear_multistep_method": "adams", "nonlinear_solver_iteration": "functional"}
    equation = {"x": u, "p": p, "ode": ca.vec(f(ca.reshape(u, 2, b), *net))}
    solver = ca.integrator("solver", "cvodes", equation, 0, np.linspace(0, T, SAVES)[1:].tolist(), options)
    saved = solver(x0=ca.vec(u0), p=ca.vertcat(*map(ca.vec, blocks)))["xf"]  # (2 b, 29)
    solved(solver)
    return ca.sumsqr(u0 - ca.repmat(data["target"][:, 0], 1, b)) + ca.sumsqr(
        saved - ca.repmat(data["target"][:, 1:], b, 1)
    )


def ode_stats(theta, data, size):
    """Of the primal, by numbers in place of symbols."""
    counts = {}
    ode(numbers(theta), numbers(data), size, solved=lambda solver: counts.update(solver.stats()))
    return {
        name: counts[key] for name, key in (("steps", "nsteps"), ("rejected", "netfails"), ("rhs_calls", "nfevals"))
    }


def attempt(net, size):
    """One attempt at a step of Dormand and Prince's pair, as a function that can be repeated: from t, the length h, u and its
    slope k (2, b), the misfit so far, the weights and the data. At the end it is not run. How long a step is, and whether it
    is taken, is not differentiated: it made the error of the gradient 3.7 times as large at small."""
    A, error, P = (x.tolist() for x in dopri5())
    b, times = size.b, ca.DM(np.linspace(0, T, SAVES)[1:]).T
    t, h, loss = ca.MX.sym("t"), ca.MX.sym("h"), ca.MX.sym("loss")
    u, k0, target = ca.MX.sym("u", 2, b), ca.MX.sym("k", 2, b), ca.MX.sym("target", 2, SAVES)
    net = [ca.MX.sym("net", *block.shape) for block in net]
    dt, k = ca.fmin(h, T - t), [k0]
    for s in range(1, 7):
        x = u + dt * sum(A[s][j] * k[j] for j in range(s))
        k.append(f(x, *net))
    off = dt * sum(error[j] * k[j] for j in range(7)) / (size.atol + size.rtol * ca.fmax(ca.fabs(u), ca.fabs(x)))
    off = ca.sqrt(ca.sumsqr(off) / (2 * b))
    taken = off <= 1
    end = ca.if_else(taken, ca.if_else(h >= T - t, T, t + dt), t)
    part = (times - t) / dt
    w = dt * ca.mtimes(ca.DM(P), ca.vertcat(*(part**n for n in range(1, 5))))  # (7, 29)
    saved = ca.repmat(ca.vec(u), 1, SAVES - 1) + ca.mtimes(ca.horzcat(*map(ca.vec, k)), w)
    inside = ca.repmat(ca.logic_and(times > t, times <= end), 2 * b, 1)
    misfit = ca.sumsqr(ca.if_else(inside, saved - ca.repmat(target[:, 1:], b, 1), 0))
    h_next = dt * ca.fmin(10, 0.9 * ca.fmax(off, 1e-6) ** -0.2)
    inputs = [t, h, u, k0, loss, *net, target]
    outputs = [end, h_next, ca.if_else(taken, x, u), ca.if_else(taken, k[6], k0), loss + misfit]
    fixed = {"is_diff_in": [False, False] + [True] * 7 + [False], "is_diff_out": [False, False, True, True, True]}
    ways = ca.Function("attempt", inputs, outputs, fixed), ca.Function("rest", inputs, inputs[:5], fixed)
    return ca.Function.if_else("step", *ways)


def ode_tape(theta, data, size):
    """As many attempts as any course may have, of which those past the end are not run: a call that is chosen by a condition
    is skipped. A mapaccum, in which all are run and some again, took 12 times the time."""
    u0, target = data["u0"], data["target"]
    net = theta["W1"].T, theta["b1"], theta["W2"].T, theta["b2"]
    step = attempt(net, size)
    state = 0, first_step(size), u0, f(u0, *net), ca.sumsqr(u0 - ca.repmat(target[:, 0], 1, size.b))
    for _ in range(attempts(size)):
        state = step(state[0] < T, *state, *net, target)
    return ca.if_else(state[0] >= T, state[-1], np.nan)


IMPLEMENTATION = {
    "rhs": {"mx": Implementation(rhs)},
    "rk4": {"mx": Implementation(rk4)},
    "ode": {
        "mx": Implementation(ode_tape),
        "cvodes": Implementation(
            ode,
            stats=ode_stats,
            strategies={"interpolating": ode, "sensitivity": ode},
            unsupported={
                "tape": "The reverse of CVODES is the adjoint equation (`TypeError: this graph holds an integrator`); see "
                "interpolating.",
                "compile": "The reverse of CVODES is the adjoint equation (`TypeError: this graph holds an integrator`); see "
                "interpolating.",
            },
        ),
    },
}
