"""The 2D Brusselator: reaction and diffusion on a periodic square (Ma et al., arXiv 1812.01892; SciMLBenchmarks).

    U_t = B + U^2 V - (A + 1) U + alpha lap U + f        f = 5 where (x - 0.3)^2 + (y - 0.6)^2 <= 0.01 and t >= 1.1
    V_t = A U - U^2 V           + alpha lap V

The grid is the thread's: x_i = i / (N - 1) along the first index, y along the second, dx = 1 / (N - 1), the N nodes wrap
around (so node 0 and node N - 1 are one physical point: an O(dx) inconsistency, kept for comparability). State u is
(2, N, N), U = u[0], V = u[1]; u0 is U = 22 (y (1 - y))^1.5, V = 27 (x (1 - x))^1.5. A = 3.4, B = 1, alpha = 10; with
alpha = 10 the field homogenises within milliseconds, alpha = 0.1 (Hairer and Wanner) is the set where alpha matters.

Tasks
    rhs    f(u; A, B, alpha) at u0 and time t, loss = <v, f> with v = gold(2 N^2): one vjp of the right-hand side.

What they ask of AD: the thread's world 2. As loops: scalar code that mutates du and branches at the wrap; as arrays:
seven shifted copies of the field. The whole derivative is a stencil again, so memory traffic is the measure.
"""

from typing import NamedTuple

import numpy as np

from problems import Task, gold

FORCING, T_FORCING = 5.0, 1.1


class Rhs(NamedTuple):
    N: int
    alpha: float = 10.0
    A: float = 3.4
    B: float = 1.0
    t: float = 2.0


def initial(N):
    """u0, (2, N, N)."""
    x = np.arange(N) / (N - 1)
    u, v = 22 * (x * (1 - x)) ** 1.5, 27 * (x * (1 - x)) ** 1.5
    return np.stack([np.tile(u, (N, 1)), np.tile(v[:, None], (1, N))])


def disc(N):
    """1 where the forcing acts, (N, N); in float64 on the host, because float32 loses a cell at N = 11, 21, 101."""
    x = np.arange(N) / (N - 1)
    return ((x[:, None] - 0.3) ** 2 + (x - 0.6) ** 2 <= 0.01).astype(float)


def rhs_inputs(size):
    N = size.N
    theta = {"u": initial(N), "A": np.array(size.A), "B": np.array(size.B), "alpha": np.array(size.alpha)}
    return theta, {"disc": disc(N), "v": gold(2 * N * N).reshape(2, N, N)}


# array: whole arrays, functional


def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (np.roll(u, 1, -2) + np.roll(u, -1, -2) + np.roll(u, 1, -1) + np.roll(u, -1, -1) - 4 * u) * (N - 1) ** 2


def reaction(u, A, B, force):
    """All that is not diffusion."""
    U, V = u
    U2V = U * U * V
    return np.stack([B + U2V - (A + 1) * U + force, A * U - U2V])


def rhs(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    du = reaction(u, A, B, force) + alpha * lap(u, size.N)
    return np.sum(data["v"] * du)


# inplace: slices and buffers mutated


def rhs_inplace(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    c = alpha * (size.N - 1) ** 2
    du = np.empty(u.shape, np.result_type(u, c))
    du[:] = -4 * u
    du[:, 1:] += u[:, :-1]
    du[:, 0] += u[:, -1]
    du[:, :-1] += u[:, 1:]
    du[:, -1] += u[:, 0]
    du[:, :, 1:] += u[:, :, :-1]
    du[:, :, 0] += u[:, :, -1]
    du[:, :, :-1] += u[:, :, 1:]
    du[:, :, -1] += u[:, :, 0]
    du *= c
    U, V = u
    U2V = U * U * V
    du[0] += B + U2V - (A + 1) * U
    du[1] += A * U - U2V
    if size.t >= T_FORCING:
        du[0] += FORCING * data["disc"]
    du *= data["v"]
    return du.sum()


# loops: scalar loops, mutated


def rhs_loops(theta, data, size):
    u, A, B, alpha, disc, v = theta["u"], theta["A"], theta["B"], theta["alpha"], data["disc"], data["v"]
    N = size.N
    c = alpha * (N - 1) ** 2
    force = FORCING if size.t >= T_FORCING else 0.0
    du = np.empty(u.shape, np.result_type(u, c))
    for i in range(N):
        im = i - 1 if i > 0 else N - 1
        ip = i + 1 if i < N - 1 else 0
        for j in range(N):
            jm = j - 1 if j > 0 else N - 1
            jp = j + 1 if j < N - 1 else 0
            U, V = u[0, i, j], u[1, i, j]
            lapU = u[0, im, j] + u[0, ip, j] + u[0, i, jm] + u[0, i, jp] - 4 * U
            lapV = u[1, im, j] + u[1, ip, j] + u[1, i, jm] + u[1, i, jp] - 4 * V
            U2V = U * U * V
            du[0, i, j] = B + U2V - (A + 1) * U + c * lapU + force * disc[i, j]
            du[1, i, j] = A * U - U2V + c * lapV
    loss = 0.0
    for s in range(2):
        for i in range(N):
            for j in range(N):
                loss += v[s, i, j] * du[s, i, j]
    return loss


TASKS = {
    "rhs": Task(
        size=Rhs,
        sizes={"tiny": Rhs(8), "small": Rhs(32), "large": Rhs(256)},
        inputs=rhs_inputs,
        forms={"array": rhs, "inplace": rhs_inplace, "loops": rhs_loops},
        gate=1e-10,
        gate32=2e-6,
        lower={"N": 3},
        floor="u",
    ),
}
