"""The neural ODE in JAX: written for one trajectory, a scan over the steps, vmap over the batch."""

import jax
import jax.numpy as jnp

from problems import Implementation
from problems.neural_ode import SAVES, T


def f(u, W1, b1, W2, b2):
    return W2 @ jnp.tanh(W1 @ u**3 + b1) + b2


def rhs(theta, data, size):
    return data["v"] @ f(**theta)


def step(u, dt, net):
    k1 = f(u, **net)
    k2 = f(u + dt / 2 * k1, **net)
    k3 = f(u + dt / 2 * k2, **net)
    k4 = f(u + dt * k3, **net)
    return u + dt / 6 * (k1 + 2 * (k2 + k3) + k4)


def misfit(saved, data):
    """saved (b, 29, 2): without t = 0."""
    u0, target = data["u0"], data["target"]
    return jnp.sum((u0 - target[0]) ** 2) + jnp.sum((saved - target[1:]) ** 2)


def rk4(theta, data, size):
    dt = T / (SAVES - 1) / size.m

    def each(u, _):
        u = step(u, dt, theta)
        return u, u

    def trajectory(u0):
        _, u = jax.lax.scan(each, u0, length=(SAVES - 1) * size.m)  # two nested scans take 1.1 times as long at m = 4
        return u[size.m - 1 :: size.m]

    return misfit(jax.vmap(trajectory)(data["u0"]), data)


def rk4_checkpoint(theta, data, size):
    """The reverse pass keeps the states at the save times, and takes the m steps between two of them again."""
    dt = T / (SAVES - 1) / size.m

    @jax.checkpoint
    def interval(u, _):
        u, _ = jax.lax.scan(lambda u, _: (step(u, dt, theta), None), u, length=size.m)
        return u, u

    def trajectory(u0):
        return jax.lax.scan(interval, u0, length=SAVES - 1)[1]

    return misfit(jax.vmap(trajectory)(data["u0"]), data)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "rk4": {"array": Implementation(rk4, strategies={"checkpoint": rk4_checkpoint})},
}
