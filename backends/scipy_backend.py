"""SciPy: no AD. Its solvers integrate an equation, and beside or after it the tangents or the adjoint, written by hand."""

import numpy as np

from backends.numpy_backend import NumPy


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
            for name, a in (theta | data).items():
                if a.dtype == np.float32:
                    raise TypeError(f"solve_ivp computes in float64 only, and {name} is float32")
            return derivative(theta, data)

        return call


BACKEND = SciPy
