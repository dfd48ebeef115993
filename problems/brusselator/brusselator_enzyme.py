"""The Brusselator in Numba for Enzyme: the very loops of the hand-written adjoint's primal."""

import jax.numpy as jnp
from numba import njit

from backends.enzyme_backend import differentiable, scratch
from problems import Implementation
from problems.brusselator import FORCING, T_FORCING, clock, eigenvalues, fourier
from problems.brusselator.brusselator_numba import imex_kernel, rhs_kernel


def rhs(theta, data, size):
    force = FORCING if size.t >= T_FORCING else 0.0
    c = theta["alpha"] * (size.N - 1) ** 2
    return differentiable(rhs_kernel)(theta["u"], theta["A"], theta["B"], c, force, data["disc"], data["v"])


def solver(alpha, size, Q):
    """The coefficients of `diffuse`, in JAX: they are small."""
    c, mu = size.dt * alpha * (size.N - 1) ** 2, -size.dt * alpha * eigenvalues(size.N).astype(Q.dtype)
    d = 1 + 2 * c + mu
    a = 2 * c / (d + jnp.sqrt(d * d - 4 * c * c))
    gain = (1 - a) ** 2 / (1 + mu)
    return Q, (Q * gain).T, a, 1 / (1 - a**size.N), scratch(size.N, Q.dtype)


@njit(fastmath=True)
def from_start(u0, A, B, disc, S, dt, steps, every, first, states, r, waves):
    for i in range(u0.shape[0]):
        for j in range(u0.shape[1]):
            states[0, i, j] = u0[i, j]
    return imex_kernel(states, A, B, disc, S, dt, steps, every, first, r, waves)


def imex(theta, data, size):
    N, dtype, (saves, every, first) = size.N, theta["u0"].dtype, clock(size)
    S = solver(theta["alpha"], size, fourier(N).astype(dtype))
    states, r, waves = (scratch(shape, dtype) for shape in ((2, 2 * N, N), (2 * N, N), (2 * N, N)))
    u0, A, B = theta["u0"].reshape(2 * N, N), theta["A"], theta["B"]
    return differentiable(from_start)(u0, A, B, data["disc"], S, size.dt, saves * every, every, first, states, r, waves)


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs)},
    "imex": {"loops": Implementation(imex)},
}
