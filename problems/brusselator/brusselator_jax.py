"""The Brusselator in JAX: whole arrays, functional."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from problems import Implementation
from problems.brusselator import FORCING, T_FORCING, clock, eigenvalues


def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (jnp.roll(u, 1, -2) + jnp.roll(u, -1, -2) + jnp.roll(u, 1, -1) + jnp.roll(u, -1, -1) - 4 * u) * (N - 1) ** 2


def reaction(u, A, B, force):
    """All that is not diffusion."""
    U, V = u
    U2V = U * U * V
    return jnp.stack([B + U2V - (A + 1) * U + force, A * U - U2V])


def rhs(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    du = reaction(u, A, B, force) + alpha * lap(u, size.N)
    return jnp.vdot(data["v"], du)


def imex(theta, data, size, keep=lambda interval: interval):
    """Two real fields, one complex FFT: S is real, so S (U + i V) = S U + i S V; 1.2 times faster than rfft2, and than Q."""
    u0, A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    lam = eigenvalues(size.N).astype(u0.dtype)
    g = 1 / (1 - dt * alpha * (lam[:, None] + lam))

    def misfit(U, V):
        return jnp.sum((1 - U) ** 2 + (1 - V) ** 2) / 2

    def step(u, force):
        U, V = u
        flow = A * U - U * U * V
        r = lax.complex(U + dt * (B - U - flow + force * data["disc"]), V + dt * flow)
        w = jnp.fft.ifft2(g * jnp.fft.fft2(r))
        return (w.real, w.imag), None

    @keep
    def interval(u, forces):
        u, _ = lax.scan(step, u, forces)
        return u, misfit(*u)

    forces = FORCING * (np.arange(saves * every) >= first).astype(u0.dtype)
    _, losses = lax.scan(interval, tuple(u0), forces.reshape(saves, every))
    return misfit(*u0) + jnp.sum(losses)


def imex_checkpoint(theta, data, size):
    """One state a sample is stored, those in between are computed again."""
    return imex(theta, data, size, jax.checkpoint)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "imex": {"array": Implementation(imex, strategies={"checkpoint": imex_checkpoint})},
}
