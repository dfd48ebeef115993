"""The Brusselator in CasADi: whole arrays (MX), second differences as a sparse matrix, time is a mapaccum; ode is CVODES's.

Fields come transposed, which a square does not notice: lap and S treat x and y alike.
"""

import casadi as ca
import numpy as np

from backends.casadi_backend import numbers
from problems import Implementation
from problems.brusselator import (
    A_UDE,
    B_UDE,
    FORCING,
    MOST_NEWTON,
    MOST_STEPS,
    T_FORCING,
    clock,
    eigenvalues,
    fourier,
    pieces,
    second_difference,
)

UNROLLED = 6  # Newton iterations where each is differentiated: as many in every step, one more than they need


def sparse_difference(N):
    return ca.sparsify(ca.DM(second_difference(N)))


def rhs(theta, data, size):
    (U, V), A, B, alpha = ca.horzsplit(theta["u"], size.N), theta["A"], theta["B"], theta["alpha"]
    L = sparse_difference(size.N)
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    U2V = U * U * V
    dU = B + U2V - (A + 1) * U + force + alpha * (ca.mtimes(L, U) + ca.mtimes(U, L))
    dV = A * U - U2V + alpha * (ca.mtimes(L, V) + ca.mtimes(V, L))
    return ca.dot(data["v"], ca.horzcat(dU, dV))


def step(size):
    """The step as a function that can be repeated, with S - 1 = h in the Fourier basis."""
    N, dt, Q = size.N, size.dt, ca.DM(fourier(size.N))
    u, push, A, B, h = (
        ca.MX.sym("u", N, 2 * N),
        ca.MX.sym("push", N, N),
        ca.MX.sym("A"),
        ca.MX.sym("B"),
        ca.MX.sym("h", N, N),
    )
    U, V = ca.horzsplit(u, N)
    flow = A * U - U * U * V

    def solve(r):
        return r + ca.mtimes(ca.mtimes(Q, h * ca.mtimes(ca.mtimes(Q.T, r), Q)), Q.T)

    u1 = ca.horzcat(solve(U + dt * (B - U - flow + push)), solve(V + dt * flow))
    return ca.Function("step", [u, push, A, B, h], [u1])


def imex(theta, data, size, base=10):
    u0, N = theta["u0"], size.N
    saves, every, first = clock(size)
    steps = saves * every
    lam = eigenvalues(N)
    z = size.dt * theta["alpha"] * ca.DM(lam[:, None] + lam)
    h = z / (1 - z)  # 0 for the mean, so that 300 steps do not see Q^T Q = 1 + rounding
    forced = ca.DM(FORCING * (np.arange(steps)[None] >= first))
    parameters = ca.kron(forced, data["disc"]), *(ca.repmat(p, 1, steps) for p in (theta["A"], theta["B"], h))
    u = step(size).mapaccum(steps, {"base": base})(u0, *parameters)  # (N, 2 N steps)
    saved = ca.horzcat(u0, *ca.horzsplit(u, 2 * N)[every - 1 :: every])
    return ca.sumsqr(1 - saved) / 2


def imex_flat(theta, data, size):
    """All steps in a row, not nested by tens, each level of which runs the steps again: 1.3 times as fast at N = 32, 1.5
    at 64. As C code a row of steps takes long to compile."""
    return imex(theta, data, size, base=-1)


def network(u, W1, b1, W2, b2):
    """What stands for U^2 V, (N, N), of u (N, 2 N); W1 comes transposed."""
    N = u.shape[0]
    z = ca.tanh(ca.mtimes(W1.T, ca.reshape(u, N * N, 2).T) + ca.repmat(b1, 1, N * N))
    return ca.reshape(ca.mtimes(W2.T, z) + b2, N, N)


def ude_step(size, net):
    """As `step`, with the network, and h a constant."""
    N, dt, Q, lam = size.N, size.dt, ca.DM(fourier(size.N)), eigenvalues(size.N)
    x = dt * size.alpha * (lam[:, None] + lam)
    h = ca.DM(x / (1 - x))
    u, push = ca.MX.sym("u", N, 2 * N), ca.MX.sym("push", N, N)
    net = [ca.MX.sym("net", *block.shape) for block in net]
    U, V = ca.horzsplit(u, N)
    flow = A_UDE * U - network(u, *net)

    def solve(r):
        return r + ca.mtimes(ca.mtimes(Q, h * ca.mtimes(ca.mtimes(Q.T, r), Q)), Q.T)

    u1 = ca.horzcat(solve(U + dt * (B_UDE - U - flow + push)), solve(V + dt * flow))
    return ca.Function("step", [u, push, *net], [u1])


def ude(theta, data, size, base=10):
    u0, target, N = data["u0"], data["target"], size.N
    saves, every, first = clock(size)
    steps, net = saves * every, [theta[name] for name in ("W1", "b1", "W2", "b2")]
    forced = ca.DM(FORCING * (np.arange(steps)[None] >= first))
    parameters = ca.kron(forced, data["disc"]), *(ca.repmat(block, 1, steps) for block in net)
    u = ude_step(size, net).mapaccum(steps, {"base": base})(u0, *parameters)  # (N, 2 N steps)
    saved = ca.horzcat(u0, *ca.horzsplit(u, 2 * N)[every - 1 :: every])
    return ca.sumsqr(saved - target) / target.numel()


def ude_flat(theta, data, size):
    return ude(theta, data, size, base=-1)


def residual(size):
    """Of a step of backward Euler, scalar by scalar (SX), so that its Jacobian is sparse: the unknowns, the rest, F."""
    N, dt, D = size.N, size.dt, sparse_difference(size.N)
    x, u, push = ca.SX.sym("x", 2 * N * N), ca.SX.sym("u", N, 2 * N), ca.SX.sym("push", N, N)
    A, B, alpha = ca.SX.sym("A"), ca.SX.sym("B"), ca.SX.sym("alpha")
    U, V = ca.horzsplit(ca.reshape(x, N, 2 * N), N)
    flow = A * U - U * U * V
    dU = B - U - flow + push + alpha * (ca.mtimes(D, U) + ca.mtimes(U, D))
    dV = flow + alpha * (ca.mtimes(D, V) + ca.mtimes(V, D))
    return x, [u, push, A, B, alpha], x - ca.vec(u + dt * ca.horzcat(dU, dV))


def unrolled(x, p, F):
    """The root as Newton's iteration itself, NaN where it does not stand."""
    system = ca.Function("system", [x, *p], [F, ca.jacobian(F, x)])

    def root(w, *p):
        dw = 0
        for _ in range(UNROLLED):
            F, J = system(w, *p)
            dw = ca.solve(J, F, "qr")
            w = w - dw
        return w + ca.if_else(ca.norm_inf(dw) <= 1e-8, 0, np.nan)

    return root


def rootfinder(x, p, F):
    """CasADi's own Newton, which it differentiates by the implicit function theorem."""
    options = {"linear_solver": "qr", "max_iter": MOST_NEWTON}
    find = ca.rootfinder("find", "newton", {"x": x, "p": ca.vertcat(*map(ca.vec, p)), "g": F}, options)
    return lambda w, *p: find(w, ca.vertcat(*map(ca.vec, p)))


def implicit(theta, data, size, root=unrolled):
    u0, N = theta["u0"], size.N
    saves, every, first = clock(size)
    steps = saves * every
    x, p, F = residual(size)
    inputs = [ca.MX.sym("p", *each.shape) for each in p]
    w = root(x, p, F)(ca.vec(inputs[0]), *inputs)
    step = ca.Function("step", inputs, [ca.reshape(w, N, 2 * N)])
    forced = ca.DM(FORCING * (np.arange(1, steps + 1)[None] >= first))
    parameters = (ca.repmat(theta[name], 1, steps) for name in ("A", "B", "alpha"))
    u = step.mapaccum(steps, {"base": -1})(u0, ca.kron(forced, data["disc"]), *parameters)  # (N, 2 N steps)
    saved = ca.horzcat(u0, *ca.horzsplit(u, 2 * N)[every - 1 :: every])
    return ca.sumsqr(1 - saved) / 2


def implicit_root(theta, data, size):
    return implicit(theta, data, size, rootfinder)


def ode(theta, data, size, plugin="cvodes", solved=lambda solver: None):
    """CVODES (Hindmarsh et al., ACM TOMS 31 (2005) 363): BDF of variable order, Newton with a sparse QR. Its gradient is the
    adjoint equation, solved on the interpolated solution, or sensitivities, integrated beside it. It stops where the forcing
    sets in, and samples by interpolation. So does IDAS, whose BDF takes the equation as F(t, u, u') = 0."""
    N, D = size.N, sparse_difference(size.N)
    x, push = ca.SX.sym("x", 2 * N * N), ca.SX.sym("push", N, N)
    A, B, alpha1, alpha2 = fields = [ca.SX.sym(name, N, N) for name in ("A", "B", "alpha1", "alpha2")]
    U, V = ca.horzsplit(ca.reshape(x, N, 2 * N), N)
    flow = A * U - U * U * V
    dU = B - U - flow + push + alpha1 * (ca.mtimes(D, U) + ca.mtimes(U, D))
    dV = flow + alpha2 * (ca.mtimes(D, V) + ca.mtimes(V, D))
    p = ca.vertcat(*map(ca.vec, [push, *fields]))
    equation = {"x": x, "p": p, "ode": ca.vec(ca.horzcat(dU, dV))}
    options = {"reltol": size.rtol, "abstol": size.atol, "max_num_steps": MOST_STEPS}  # its QR is faster than its LU
    lengths, forced, sampled = pieces(size)
    u = ca.vec(data["u0"])
    loss = ca.sumsqr(1 - u) / 2
    for force in np.unique(forced):
        here = forced == force
        solver = ca.integrator("solver", plugin, equation, 0, np.cumsum(lengths[here]).tolist(), options)
        values = FORCING * force * data["disc"], *(theta[name] for name in ("A", "B", "alpha1", "alpha2"))
        states = ca.horzsplit(solver(x0=u, p=ca.vertcat(*map(ca.vec, values)))["xf"])
        solved(solver)
        loss += sum(ca.sumsqr(1 - w) / 2 for w, taken in zip(states, sampled[here], strict=True) if taken)
        u = states[-1]
    return loss


def ode_idas(theta, data, size):
    return ode(theta, data, size, "idas")


def ode_stats(theta, data, size, plugin="cvodes"):
    """Of the primal, by numbers in place of symbols."""
    counts = []
    ode(numbers(theta), numbers(data), size, plugin, solved=lambda solver: counts.append(solver.stats()))
    names = {
        "steps": "nsteps",
        "rejected": "netfails",
        "rhs_calls": "nfevals",
        "jacobians": "nlinsetups",
        "linear_solves": "nniters",
    }
    return {name: sum(stats[key] for stats in counts) for name, key in names.items()}


def ode_idas_stats(theta, data, size):
    return ode_stats(theta, data, size, "idas")


IMPLEMENTATION = {
    "rhs": {"mx": Implementation(rhs)},
    "imex": {"mx": Implementation(imex, strategies={"tape": imex_flat})},
    "ude": {"mx": Implementation(ude, strategies={"tape": ude_flat})},
    "implicit": {"mx": Implementation(implicit, strategies={"implicit": implicit_root})},
    "ode": {
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
        "idas": Implementation(
            ode_idas,
            stats=ode_idas_stats,
            strategies={"interpolating": ode_idas, "sensitivity": ode_idas},
            unsupported={
                "tape": "The reverse of IDAS is the adjoint equation (`TypeError: this graph holds an integrator`); see "
                "interpolating.",
                "compile": "The reverse of IDAS is the adjoint equation (`TypeError: this graph holds an integrator`); see "
                "interpolating.",
            },
        ),
    },
}
