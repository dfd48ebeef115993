"""The Brusselator in Autograd: whole arrays on the tape."""

import autograd.numpy as np

from problems import Implementation
from problems.brusselator import FORCING, T_FORCING, clock, eigenvalues, fourier


def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (np.roll(u, 1, -2) + np.roll(u, -1, -2) + np.roll(u, 1, -1) + np.roll(u, -1, -1) - 4 * u) * (N - 1) ** 2


def rhs(theta, data, size):
    (U, V), A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    U2V = U * U * V
    dU = B + U2V - (A + 1) * U + force + alpha * lap(U, size.N)
    dV = A * U - U2V + alpha * lap(V, size.N)
    return np.sum(data["v"][0] * dU) + np.sum(data["v"][1] * dV)


def misfit(U, V):
    return (np.sum((1 - U) ** 2) + np.sum((1 - V) ** 2)) / 2


def imex(theta, data, size):
    """S by products with Q: 0.7 times the time of the FFT at N = 32, the same at N = 64."""
    (U, V), A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    lam, Q = (a.astype(theta["u0"].dtype) for a in (eigenvalues(size.N), fourier(size.N)))
    z = dt * alpha * (lam[:, None] + lam)
    h = z / (1 - z)  # S - 1 in the basis Q: it is 0 for the mean, so that 300 steps do not see Q^T Q = 1 + rounding
    push = FORCING * data["disc"]

    def solve(r):
        return r + np.dot(np.dot(Q, h * np.dot(np.dot(Q.T, r), Q)), Q.T)

    loss = misfit(U, V)
    for n in range(saves * every):
        flow = A * U - U * U * V
        source = B - U - flow
        if n >= first:
            source = source + push
        U, V = solve(U + dt * source), solve(V + dt * flow)
        if (n + 1) % every == 0:
            loss = loss + misfit(U, V)
    return loss


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "imex": {"array": Implementation(imex)},
}
