"""Numba: compiled loops. It has no AD; adjoints and dual numbers are by hand, and the adjoints the measure of all others."""

import numpy as np

from backends import Backend
from backends.numpy_backend import central_difference

LANES = 8  # tangents that a dual number carries: one AVX-512 register of float64


def by_chunks(theta, dual):
    """Forward mode over all entries of theta, LANES at once. `dual(tangents, out)` runs the duals: tangents are those of
    theta's blocks, (..., LANES), out takes the tangents of the loss, which it returns."""
    sizes, dtype = [np.size(block) for block in theta.values()], np.result_type(*theta.values())
    n, ends = sum(sizes), np.cumsum(sizes)[:-1]
    flat, gradient = np.zeros((n, LANES), dtype), np.empty(n + LANES, dtype)
    parts = zip(theta.items(), np.split(flat, ends), strict=True)
    tangents = {name: part.reshape(*block.shape, LANES) for (name, block), part in parts}
    for first in range(0, n, LANES):
        seeds = flat[first : first + LANES]
        np.fill_diagonal(seeds, 1)
        loss = dual(tangents, gradient[first : first + LANES])
        seeds[:] = 0
    parts = zip(theta.items(), np.split(gradient[:n], ends), strict=True)
    return loss, {name: part.reshape(block.shape) for (name, block), part in parts}


class Numba(Backend):
    requires = ("numba", "llvmlite", "numpy", "scipy")
    all_cores = True

    @staticmethod
    def environ(threads):
        return {"NUMBA_CACHE_DIR": ""}

    def __init__(self, device):
        import numba  # noqa: F401 - to fail here, not in the middle of a cell

    def keep_compiled(self, implementation, folder):
        from numba.core import config
        from numba.core.dispatcher import Dispatcher

        config.CACHE_DIR = folder
        for function in vars(implementation).values():
            if isinstance(function, Dispatcher):
                function.enable_caching()

    def put(self, array):
        return array

    def get(self, array):
        return np.asarray(array)

    def wait(self, result):
        return result

    def primal(self, loss):
        return loss

    def adjoint(self, gradient):
        return gradient

    def duals(self, gradient):
        return gradient

    def difference(self, loss):
        return central_difference(loss)


BACKEND = Numba
