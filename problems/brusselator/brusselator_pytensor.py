"""The Brusselator in PyTensor: whole arrays, symbolic; time is a scan."""

import numpy as np
import pytensor
import pytensor.tensor as pt

from problems import Implementation
from problems.brusselator import FORCING, T_FORCING, clock, eigenvalues, fourier


def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (pt.roll(u, 1, -2) + pt.roll(u, -1, -2) + pt.roll(u, 1, -1) + pt.roll(u, -1, -1) - 4 * u) * (N - 1) ** 2


def reaction(u, A, B, force):
    """All that is not diffusion."""
    U, V = u[0], u[1]  # a variable cannot be unpacked
    U2V = U * U * V
    return pt.stack([B + U2V - (A + 1) * U + force, A * U - U2V])


def rhs(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    du = reaction(u, A, B, force) + alpha * lap(u, size.N)
    return pt.sum(data["v"] * du)


def imex(theta, data, size):
    u0, A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    lam, Q = (a.astype(u0.dtype) for a in (eigenvalues(size.N), fourier(size.N)))
    z = dt * alpha * (lam[:, None] + lam)
    h = z / (1 - z)  # S - 1 in the basis Q: it is 0 for the mean, so that 300 steps do not see Q^T Q = 1 + rounding

    def diffuse(r, h):
        return r + Q @ (h * (Q.T @ r @ Q)) @ Q.T

    def step(push, U, V, A, B, h, disc):
        flow = A * U - U * U * V
        return diffuse(U + dt * (B - U - flow + push * disc), h), diffuse(V + dt * flow, h)

    def misfit(u):
        return pt.sum((1 - u) ** 2) / 2

    forces = FORCING * (np.arange(saves * every) >= first).astype(u0.dtype)
    states = pytensor.scan(
        step, forces, [u0[0], u0[1]], [A, B, h, data["disc"]], strict=True, return_updates=False
    )  # fields one by one: products of matrices are BLAS, of stacks of them are loops
    return misfit(u0) + sum(misfit(field[every - 1 :: every]) for field in states)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "imex": {"array": Implementation(imex)},
}
