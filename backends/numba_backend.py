"""Numba: compiled loops. It has no AD; the adjoints are written by hand, and are the measure of all others."""

import numpy as np

from backends import Backend
from backends.numpy_backend import central_difference


class Numba(Backend):
    requires = ("numba", "llvmlite", "numpy", "scipy")

    @staticmethod
    def environ(threads):
        return {"NUMBA_CACHE_DIR": ""}

    def __init__(self, device):
        import numba  # noqa: F401 - to fail here, not in the middle of a cell

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

    def difference(self, loss):
        return central_difference(loss)


BACKEND = Numba
