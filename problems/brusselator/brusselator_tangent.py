"""The Brusselator in Tangent: the subset of NumPy that it can rewrite, one name an assignment.

Forward mode has no tangents for globals, only for attributes: constants are those of their module.
"""

import numpy as np

from problems import Implementation, brusselator
from problems.brusselator import clock, eigenvalues, fourier


def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (np.roll(u, 1, -2) + np.roll(u, -1, -2) + np.roll(u, 1, -1) + np.roll(u, -1, -1) - 4 * u) * (N - 1) ** 2


def forcing(disc, size):
    """A statement, because forward mode has no conditional expressions."""
    force = 0.0 * disc
    if size.t >= brusselator.T_FORCING:
        force = brusselator.FORCING * disc
    return force


def rhs(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = forcing(data["disc"], size)
    U, V = u[0], u[1]
    U2V = U * U * V
    dU = B + U2V - (A + 1) * U + force + alpha * lap(U, size.N)
    dV = A * U - U2V + alpha * lap(V, size.N)
    return np.sum(data["v"][0] * dU) + np.sum(data["v"][1] * dV)


def solve(r, h, Q):
    """S in the real Fourier basis Q: there is no FFT in Tangent."""
    waves = np.dot(np.dot(np.transpose(Q), r), Q)
    return r + np.dot(np.dot(Q, h * waves), np.transpose(Q))


def misfit(U, V):
    return (np.sum((1 - U) ** 2) + np.sum((1 - V) ** 2)) / 2


def imex(theta, data, size, work):
    u0, A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    forces, lam, Q = work[0], work[1], work[2]
    z = dt * alpha * lam
    h = z / (1 - z)  # S - 1 in the basis Q: it is 0 for the mean, so that 300 steps do not see Q^T Q = 1 + rounding
    U, V = u0[0], u0[1]
    loss = misfit(U, V)
    for k in range(len(forces)):
        for n in range(len(forces[k])):
            flow = A * U - U * U * V
            rU = U + dt * (B - U - flow + forces[k, n] * data["disc"])
            rV = V + dt * flow
            U = solve(rU, h, Q)
            V = solve(rV, h, Q)
        loss = loss + misfit(U, V)
    return loss


def network(U, V, W1, b1, W2, b2, x, y, N):
    """What stands for U^2 V. There is no stack, and forward mode takes no slice beside another index: x and y, (2, 1),
    are (1, 0) and (0, 1)."""
    u = np.dot(x, np.reshape(U, (1, N * N))) + np.dot(y, np.reshape(V, (1, N * N)))
    z = np.tanh(np.dot(W1, u) + np.reshape(b1, (brusselator.HIDDEN, 1)))
    return np.reshape(np.dot(W2, z) + b2, (N, N))


def ude(theta, data, size, work):
    W1, b1, W2, b2 = theta["W1"], theta["b1"], theta["W2"], theta["b2"]
    A, B, dt, target = brusselator.A_UDE, brusselator.B_UDE, size.dt, data["target"]
    forces, h, Q, x, y = work[0], work[1], work[2], work[3], work[4]
    U, V = data["u0"][0], data["u0"][1]
    loss = np.sum((U - target[0, 0]) ** 2) + np.sum((V - target[0, 1]) ** 2)
    for k in range(len(forces)):
        for n in range(len(forces[k])):
            flow = A * U - network(U, V, W1, b1, W2, b2, x, y, size.N)
            rU = U + dt * (B - U - flow + forces[k, n] * data["disc"])
            rV = V + dt * flow
            U = solve(rU, h, Q)
            V = solve(rV, h, Q)
        loss = loss + np.sum((U - target[k + 1, 0]) ** 2) + np.sum((V - target[k + 1, 1]) ** 2)
    return loss / target.size


def imex_prepare(structure, size):
    saves, every, first = clock(size)
    lam, Q, dtype = eigenvalues(size.N), fourier(size.N), structure["u0"].dtype
    forces = brusselator.FORCING * (np.arange(saves * every) >= first)
    return forces.astype(dtype).reshape(saves, every), (lam[:, None] + lam).astype(dtype), Q.astype(dtype)


def ude_prepare(structure, size):
    forces, lam, Q = imex_prepare(structure, size)
    z = size.dt * size.alpha * lam
    return forces, z / (1 - z), Q, *np.eye(2, dtype=Q.dtype).reshape(2, 2, 1)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "imex": {"array": Implementation(imex, imex_prepare)},
    "ude": {"array": Implementation(ude, ude_prepare)},
}
