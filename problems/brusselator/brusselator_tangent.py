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


def imex_prepare(structure, size):
    saves, every, first = clock(size)
    lam, Q, dtype = eigenvalues(size.N), fourier(size.N), structure["u0"].dtype
    forces = brusselator.FORCING * (np.arange(saves * every) >= first)
    return forces.astype(dtype).reshape(saves, every), (lam[:, None] + lam).astype(dtype), Q.astype(dtype)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "imex": {"array": Implementation(imex, imex_prepare)},
}
