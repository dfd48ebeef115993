"""The neural ODE in Numba for Enzyme: the very loops of the hand-written adjoint's primal, with another tanh."""

import numpy as np
from numba import njit

from backends.enzyme_backend import differentiable, scratch
from problems import Implementation
from problems.neural_ode import SAVES, T
from problems.neural_ode.neural_ode_numba import from_bits, kernels


@njit(fastmath={"contract", "nnan", "ninf", "nsz"}, error_model="numpy")
def tanh(x):
    """As the one beside the adjoint, but 2^n is a factor of its own: integers carry no derivative."""
    x = min(max(x, -20.0), 20.0)
    n = np.floor(x * 2.8853900817779268 + 0.5)
    r = (x - n * 0.34657359026372431) - n * 1.6248338976343925e-11
    y = r * r
    p = r * (1 + y * (4 / 33 + y * (1 / 495)))
    q = 1 + y * (5 / 11 + y * (2 / 99 + y * (1 / 10395)))
    s = from_bits((np.int64(n) + 1023) << 52) * (q + p)
    return (s - (q - p)) / (s + (q - p))


@njit(fastmath=True, error_model="numpy")
def rhs_kernel(u, W1, b1, W2, b2, v):
    c0, c1 = u[0] * u[0] * u[0], u[1] * u[1] * u[1]
    f0, f1 = b2[0], b2[1]
    for j in range(b1.size):
        z = tanh(W1[j, 0] * c0 + W1[j, 1] * c1 + b1[j])
        f0 += W2[0, j] * z
        f1 += W2[1, j] * z
    return v[0] * f0 + v[1] * f1


def rhs(theta, data, size):
    return differentiable(rhs_kernel)(*(theta[name] for name in ("u", "W1", "b1", "W2", "b2")), data["v"])


def rk4(theta, data, size):
    dtype, n, H = theta["W1"].dtype, 4 * size.m * (SAVES - 1), size.H
    kernel, _ = kernels(H, tanh)
    weights, dt = (theta[name] for name in ("W1", "b1", "W2", "b2")), T / (SAVES - 1) / size.m
    buffers = (scratch(shape, dtype) for shape in (5 * H, (n + 1, 2), (n, 2), (n, H)))
    return differentiable(kernel)(*weights, data["u0"], data["target"], size.m, dt, *buffers)


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs)},
    "rk4": {"loops": Implementation(rk4)},
}
