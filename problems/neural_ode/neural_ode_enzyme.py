"""The neural ODE in Numba for Enzyme: the very loops of the hand-written adjoint's primal, with another tanh."""

from numba import njit

from backends.enzyme_backend import differentiable, scratch
from backends.numba_math import tanh_by_factor as tanh
from problems import Implementation
from problems.neural_ode import SAVES, T, attempts, first_step
from problems.neural_ode.neural_ode_numba import kernels, ode_kernels


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


def ode(theta, data, size):
    """How long a step is, is differentiated, too, for no number can be exempted: it makes the error of the gradient 3.7 times
    that of the hand adjoint at small."""
    dtype, n, H = theta["W1"].dtype, attempts(size), size.H
    kernel, _ = ode_kernels(H, tanh)
    weights, given = (theta[name] for name in ("W1", "b1", "W2", "b2")), (first_step(size), size.rtol, size.atol)
    shapes = (2, 5 * H), (3, 2, 8), (6 * n + 1, 4), (6 * n + 1, H), (n, 2), (SAVES, 10)
    buffers = (scratch(shape, dtype) for shape in shapes)
    return differentiable(kernel)(*weights, data["u0"], data["target"], *given, *buffers, scratch(3, "int64"))


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs)},
    "rk4": {"loops": Implementation(rk4)},
    "ode": {"loops": Implementation(ode)},
}
