"""The valley glacier in Numba for Enzyme: the very loops of the hand-written adjoint's primal."""

import numpy as np

from backends.enzyme_backend import differentiable, scratch
from problems import Implementation
from problems.shallow_ice import A_MAX, A_MIN, LAYERS, steps_a_year
from problems.shallow_ice.shallow_ice_numba import SSPRK3, rhs_kernel, scales, ude_kernel


def rhs(theta, data, size):
    N, H = size.N, theta["H"]
    unit, eps = scales(size, H.dtype)
    buffers = scratch((N, N), H.dtype), scratch((3, N), H.dtype)
    return differentiable(rhs_kernel)(H, theta["lnA"], data["B"], data["v"], unit * size.A, eps, *buffers)


def ude(theta, data, size):
    N, dtype, spy = size.N, theta["W1"].dtype, steps_a_year(size)
    unit, eps = scales(size, dtype)
    A_span, ssp = (np.array(x, dtype) for x in ([A_MIN, A_MAX - A_MIN], SSPRK3))
    X = scratch((3 * size.years * spy + 1, 1, 1), dtype)  # the primal only asks how long the trajectory is
    L, rows, none = scratch((4, N, N), dtype), scratch((3, N), dtype), scratch(1, dtype)
    z = tuple(scratch(n, dtype) for n in LAYERS)
    weights = tuple(theta[f"{kind}{layer}"] for layer in range(1, len(LAYERS)) for kind in "Wb")
    fields = (data[name] for name in ("B", "H0", "Href", "T"))
    return differentiable(ude_kernel)(weights, *fields, unit / spy, eps, A_span, ssp, X, L, rows, z, z, none, (none,))


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs)},
    "ude": {"loops": Implementation(ude)},
}
