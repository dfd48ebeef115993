"""The Brusselator in JAX: whole arrays, functional."""

import jax.numpy as jnp

from problems import Implementation
from problems.brusselator import FORCING, T_FORCING


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


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
}
