"""SciPy: no AD. Its solvers integrate an equation, and beside or after it the tangents or the adjoint, written by hand."""

import numpy as np

from backends import double_only
from backends.numpy_backend import NumPy

NODES, WEIGHTS = np.polynomial.legendre.leggauss(3)


def gauss(t):
    """Three of Gauss's nodes in each step of a solution backwards in time, its times falling, and their positive weights."""
    half = -np.diff(t)[:, None] / 2
    return (t[1:, None] + half * (1 + NODES)).ravel(), (half * WEIGHTS).ravel()


class SciPy(NumPy):
    entrywise = {}

    def quadrature(self, derivative):
        return self._in_double(derivative)

    def interpolating(self, derivative):
        return self._in_double(derivative)

    def sensitivity(self, derivative):
        return self._in_double(derivative)

    def _in_double(self, derivative):
        def call(theta, data):
            double_only("solve_ivp", theta | data)
            return derivative(theta, data)

        return call


BACKEND = SciPy
