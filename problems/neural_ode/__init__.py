"""The spiral neural ODE (DiffEqFlux's example, the thread's world 1): a network stands for the right-hand side.

    du/dt = f(u) = W2 tanh(W1 u^3 + b1) + b2       u (2), u^3 entry by entry, W1 (H,2), b1 (H), W2 (2,H), b2 (2)
    truth:  du/dt = (u^3)^T A,   A = [[-0.1, 2], [-2, -0.1]],   u(0) = (2, 0),   saved at t = linspace(0, 1.5, 30)

All without units. The biases start at 0, the weights at 0.1 sqrt(12) times numbers from gold(5 H + 2). The data are the
truth at the save times, (30, 2), to rounding (DOP853). A batch of b trajectories starts at u0_k = (2, 0) + (k > 0) q_k,
q = gold(2 b, 7).reshape(b, 2); every member is fitted to the same data, the one trajectory from (2, 0).

Tasks
    rhs    f at u = (2, 0), loss = <v, f> with v = (1, -0.5): one vjp of the network.
    rk4    L = sum over batch, save times (t = 0 too) and components of (u_k(t_i) - data_i)^2; the classical Runge-Kutta
           method with m steps between save times, dt = 1.5 / 29 / m. The gradient is that of the discrete program.
    ode    the same loss of the solution itself. The solver chooses its steps, to rtol and atol, and interpolates to the save
           times (here SciPy's DOP853). How it steps is its own: so a gradient is judged by the derivative of the solution,
           not of a program, and its error is a result. `exact` has it by the adjoint equation, l' = -f'(u)^T l, to which
           each save time adds 2 (u - data), and dL/dp is the integral of <l, df/dp>. The complex step of the statement is
           the other way: the variational equations.

What they ask of AD: small dense layers and nothing mutated, what functional array AD was built for. With H = 50, b = 1
a layer is 100 multiplications, so the cost of a dispatched operation is the measure; with large H b it is tanh, whose
derivative 1 - tanh^2 a good reverse pass gets from the stored value. The time loop is sequential and short. ode asks what
to differentiate: the steps that a solver took, or the equation that it solved; and its loop ends when the error says so,
which reverse mode must store, bound or run backwards.
"""

from math import ceil
from typing import NamedTuple

import numpy as np
import scipy  # which imports its parts when they are used: integrate takes a third of a second

from problems import Diverged, Task, gold

T, SAVES = 1.5, 30
A = np.array([[-0.1, 2.0], [-2.0, -0.1]])
MOST_STEPS = 100_000
SHORTEST = 1e-12  # of its steps


class Rhs(NamedTuple):
    H: int = 50


class Rk4(NamedTuple):
    H: int = 50
    m: int = 1
    b: int = 1


class Ode(NamedTuple):
    H: int = 50
    rtol: float = 1e-9
    atol: float = 1e-9
    b: int = 1


def weights(H):
    """W1, b1, W2, b2 at the start; the standard deviation is that of torchdiffeq's demo."""
    g = 0.1 * np.sqrt(12) * gold(5 * H + 2)
    return {"W1": g[: 2 * H].reshape(H, 2), "b1": np.zeros(H), "W2": g[3 * H : 5 * H].reshape(2, H), "b2": np.zeros(2)}


def truth():
    """The true trajectory, (30, 2). It stops at every save time, because dense output is of lower order."""
    t = np.linspace(0, T, SAVES)
    u = [np.array([2.0, 0.0])]
    for i in range(SAVES - 1):
        solution = scipy.integrate.solve_ivp(
            lambda _, u: u**3 @ A, (t[i], t[i + 1]), u[i], "DOP853", rtol=1e-13, atol=1e-14
        )
        u.append(solution.y[:, -1])
    return np.stack(u)


def rhs_inputs(size):
    return {"u": np.array([2.0, 0.0])} | weights(size.H), {"v": np.array([1.0, -0.5])}


def rk4_inputs(size):
    u0 = np.array([2.0, 0.0]) + gold(2 * size.b, 7).reshape(size.b, 2) * (np.arange(size.b) > 0)[:, None]
    return weights(size.H), {"u0": u0, "target": truth()}


def ode_check(size):
    if size.rtol < 1e-13:
        return f"rtol={size.rtol} is below what rounding allows; give rtol of at least 1e-13"
    if size.atol <= 0:
        return f"atol={size.atol} is not positive; give atol above 0"
    return ""


class Pair(NamedTuple):
    """An explicit Runge-Kutta pair whose last stage is the first of the next step, and what interpolates in a step."""

    A: np.ndarray  # (7, 7) below the diagonal; the last row is the weights of order 5
    error: np.ndarray  # (7) them less the weights of order 4
    P: np.ndarray  # (7, 4) the stages' weights at a part x of the step, in x, ..., x^4


def dopri5():
    """Dormand and Prince's (J. Comp. Appl. Math. 6 (1980) 19), as SciPy has it, with Shampine's interpolation of order 4 (Math.
    Comp. 46 (1986) 135); by it the implementations that have no solver of their own take the steps of ode."""
    A = np.zeros((7, 7))
    A[:6, :5], A[6, :6] = scipy.integrate.RK45.A, scipy.integrate.RK45.B
    return Pair(A, -scipy.integrate.RK45.E, scipy.integrate.RK45.P)


def first_step(size):
    """Of dopri5, before it knows an error."""
    return T * (size.rtol + size.atol) ** 0.2


def attempts(size):
    """Steps of dopri5 at most, refused ones among them, where room must be made for all: four times what the small size takes,
    by the order of the pair."""
    return ceil(64 * max(0.25, (2e-9 / (size.rtol + size.atol)) ** 0.2))


# array: whole arrays, functional


def f(u, W1, b1, W2, b2):
    """The network, u (..., 2)."""
    return np.tanh(u * u * u @ W1.T + b1) @ W2.T + b2


def rhs(theta, data, size):
    return data["v"] @ f(**theta)


def step(u, dt, net):
    k1 = f(u, **net)
    k2 = f(u + dt / 2 * k1, **net)
    k3 = f(u + dt / 2 * k2, **net)
    k4 = f(u + dt * k3, **net)
    return u + dt / 6 * (k1 + 2 * (k2 + k3) + k4)


def rk4(theta, data, size):
    u, target = data["u0"], data["target"]  # (b, 2), (30, 2)
    dt = T / (SAVES - 1) / size.m
    loss = np.sum((u - target[0]) ** 2)
    for i in range(1, SAVES):
        for _ in range(size.m):
            u = step(u, dt, theta)
        loss = loss + np.sum((u - target[i]) ** 2)
    return loss


def ode_states(theta, data, size):
    """u at all save times, (30, b, 2). Of complex theta the imaginary part, over its scale h, is integrated beside the real one,
    to the same tolerances: the variational equations, with no subtraction in them."""
    u0 = data["u0"]
    h = max(np.max(np.abs(np.imag(block))) for block in theta.values())

    def slope(t, y):
        if h == 0:
            return f(y.reshape(u0.shape), **theta).ravel()
        u, du = y.reshape(2, *u0.shape)
        k = f(u + 1j * h * du, **theta)
        return np.concatenate([k.real.ravel(), k.imag.ravel() / h])

    y0 = u0.ravel() if h == 0 else np.append(u0, np.zeros_like(u0))
    t = np.linspace(0, T, SAVES)
    solution = scipy.integrate.solve_ivp(slope, (0, T), y0, "DOP853", t, rtol=size.rtol, atol=size.atol)
    if not solution.success:
        raise too_small()
    y = solution.y.T.reshape(SAVES, -1, *u0.shape)  # with the imaginary part, where there is one
    return y[:, 0] if h == 0 else y[:, 0] + 1j * h * y[:, 1]


def too_small():
    return Diverged("The solver's step became too small for the tolerance; give a larger rtol or atol.")


def endless():
    return Diverged(f"The solver did not get there in {MOST_STEPS} steps; give a larger rtol or atol.")


def ode(theta, data, size):
    return np.sum((ode_states(theta, data, size) - data["target"][:, None]) ** 2)


def exact(theta, data, size, rtol=1e-13, atol=1e-14):
    """The loss of the solution itself and its gradient, by the adjoint equation, with a stop at every save time."""
    W1, b1, W2, b2 = theta.values()
    u0, target, t = data["u0"], data["target"], np.linspace(0, T, SAVES)
    names = {"method": "DOP853", "rtol": rtol, "atol": atol}

    def forward(t, u):
        return f(u.reshape(u0.shape), W1, b1, W2, b2).ravel()

    def back(t, y, solution):
        l, u = y[: u0.size].reshape(u0.shape), solution(t).reshape(u0.shape)
        c = u**3
        z = np.tanh(c @ W1.T + b1)
        ab = (l @ W2) * (1 - z * z)
        ub = 3 * u * u * (ab @ W1)
        return -np.concatenate([part.ravel() for part in (ub, ab.T @ c, ab.sum(0), l.T @ z, l.sum(0))])

    pieces, u = [], [u0]
    for i in range(1, SAVES):
        solution = scipy.integrate.solve_ivp(forward, (t[i - 1], t[i]), u[-1].ravel(), dense_output=True, **names)
        pieces.append(solution.sol)
        u.append(solution.y[:, -1].reshape(u0.shape))
    y = np.zeros(u0.size + sum(block.size for block in theta.values()))
    for i in range(SAVES - 1, 0, -1):
        y[: u0.size] += 2 * (u[i] - target[i]).ravel()
        y = scipy.integrate.solve_ivp(back, (t[i], t[i - 1]), y, args=(pieces[i - 1],), **names).y[:, -1]
    blocks = np.split(y[u0.size :], np.cumsum([block.size for block in theta.values()])[:-1])
    return np.sum((np.stack(u) - target[:, None]) ** 2), {
        name: part.reshape(theta[name].shape) for name, part in zip(theta, blocks, strict=True)
    }


# inplace: slices and buffers mutated


def f_inplace(du, u, z, c, W1, b1, W2, b2):
    np.multiply(u, u, out=c)
    c *= u
    np.matmul(c, W1.T, out=z)
    z += b1
    np.tanh(z, out=z)
    np.matmul(z, W2.T, out=du)
    du += b2


def rhs_inplace(theta, data, size):
    dtype = np.result_type(*theta.values())
    du, z, c = np.empty(2, dtype), np.empty(size.H, dtype), np.empty(2, dtype)
    f_inplace(du, theta["u"], z, c, theta["W1"], theta["b1"], theta["W2"], theta["b2"])
    du *= data["v"]
    return du.sum()


def rk4_inplace(theta, data, size):
    b, H, m, target = size.b, size.H, size.m, data["target"]
    dt = T / (SAVES - 1) / m
    dtype = np.result_type(*theta.values())
    u, ui, c, k, du = np.empty((5, b, 2), dtype)
    z = np.empty((b, H), dtype)
    u[:] = data["u0"]
    loss = np.sum((u - target[0]) ** 2)
    for i in range(1, SAVES):
        for _ in range(m):
            ui[:] = u
            du[:] = 0
            for before, after in ((1 / 2, 1 / 6), (1 / 2, 1 / 3), (1, 1 / 3), (0, 1 / 6)):
                f_inplace(k, ui, z, c, **theta)
                np.multiply(k, dt * before, out=ui)  # where the next stage is taken
                ui += u
                k *= dt * after
                du += k
            u += du
        np.subtract(u, target[i], out=du)
        du *= du
        loss += du.sum()
    return loss


# loops: scalar loops, mutated


def f_loops(du, u, W1, b1, W2, b2):
    c0, c1 = u[0] * u[0] * u[0], u[1] * u[1] * u[1]
    du[0], du[1] = b2[0], b2[1]
    for j in range(len(b1)):
        z = np.tanh(W1[j, 0] * c0 + W1[j, 1] * c1 + b1[j])
        du[0] += W2[0, j] * z
        du[1] += W2[1, j] * z


def rhs_loops(theta, data, size):
    du = np.empty(2, np.result_type(*theta.values()))
    f_loops(du, **theta)
    return data["v"][0] * du[0] + data["v"][1] * du[1]


def rk4_loops(theta, data, size):
    u0, target = data["u0"], data["target"]
    dt = T / (SAVES - 1) / size.m
    u, ui, k1, k2, k3, k4 = np.empty((6, 2), np.result_type(*theta.values()))
    loss = 0.0
    for k in range(size.b):
        for s in range(2):
            u[s] = u0[k, s]
            loss += (u[s] - target[0, s]) ** 2
        for i in range(1, SAVES):
            for _ in range(size.m):
                f_loops(k1, u, **theta)
                for s in range(2):
                    ui[s] = u[s] + dt / 2 * k1[s]
                f_loops(k2, ui, **theta)
                for s in range(2):
                    ui[s] = u[s] + dt / 2 * k2[s]
                f_loops(k3, ui, **theta)
                for s in range(2):
                    ui[s] = u[s] + dt * k3[s]
                f_loops(k4, ui, **theta)
                for s in range(2):
                    u[s] += dt / 6 * (k1[s] + 2 * (k2[s] + k3[s]) + k4[s])
            for s in range(2):
                loss += (u[s] - target[i, s]) ** 2
    return loss


TASKS = {
    "rhs": Task(
        size=Rhs,
        sizes={"tiny": Rhs(10), "small": Rhs(50), "large": Rhs(4096)},
        inputs=rhs_inputs,
        forms={"array": rhs, "inplace": rhs_inplace, "loops": rhs_loops},
        gate=1e-10,
        gate32=8e-6,
        axis="H",
    ),
    "rk4": Task(
        size=Rk4,
        sizes={"tiny": Rk4(10), "small": Rk4(50), "large": Rk4(256, 4)},
        inputs=rk4_inputs,
        forms={"array": rk4, "inplace": rk4_inplace, "loops": rk4_loops},
        gate=1e-10,
        gate32=8e-6,
        axis="H",
        sweep=({"H": 1}, {"H": 2}, {"H": 4}, {"H": 20}, {"H": 100}),
    ),
    "ode": Task(
        size=Ode,
        sizes={"tiny": Ode(4, rtol=1e-6, atol=1e-6), "small": Ode(50), "large": Ode(256)},
        inputs=rk4_inputs,
        forms={"array": ode},
        exact=exact,
        reference="continuous",
        gate=0.1,
        gate32=0.1,
        check=ode_check,
        axis="H",
        sweep=({"H": 1}, {"H": 10}),
        tolerances=tuple({"H": 50, "rtol": r, "atol": r} for r in (1e-4, 1e-6, 1e-8, 1e-11)),
    ),
}
