"""The Brusselator in Numba for Enzyme: the very loops of the hand-written adjoint's primal."""

from backends.enzyme_backend import differentiable
from problems import Implementation
from problems.brusselator import FORCING, T_FORCING
from problems.brusselator.brusselator_numba import rhs_kernel


def rhs(theta, data, size):
    force = FORCING if size.t >= T_FORCING else 0.0
    c = theta["alpha"] * (size.N - 1) ** 2
    return differentiable(rhs_kernel)(theta["u"], theta["A"], theta["B"], c, force, data["disc"], data["v"])


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs)},
}
