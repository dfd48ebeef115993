"""NumPy: no AD. It runs the statement itself, so a problem in one file has its cells at once."""

import numpy as np

from backends import Backend

H = 1e-20  # no subtraction, so no cancellation: as small as you like
CBRT_EPS = np.finfo(float).eps ** (1 / 3)  # balances truncation h^2 against rounding eps / h


class NumPy(Backend):
    requires = ("numpy", "scipy")
    entrywise = {"complex_step": (complex, 1), "difference": (float, 2)}

    def __init__(self, device):
        pass

    def put(self, array):
        return array

    def get(self, array):
        return np.asarray(array)

    def wait(self, result):
        return result

    def primal(self, loss):
        return loss

    def complex_step(self, loss):
        def derivative(theta, data):
            value, gradient = loss(theta, data), {}
            for name, block in theta.items():
                gradient[name] = np.empty(block.shape, block.dtype)
                z = block.astype(complex)
                step = theta | {name: z}
                for k in np.ndindex(block.shape):
                    z[k] += 1j * H
                    gradient[name][k] = np.imag(loss(step, data)) / H
                    z[k] = block[k]
            return value, gradient

        return derivative

    def difference(self, loss):
        return central_difference(loss)


def central_difference(loss):
    """(loss(x + h) - loss(x - h)) / 2 h for each entry, h = eps^(1/3) max(1, |x|)."""

    def derivative(theta, data):
        value, gradient = loss(theta, data), {}
        for name, block in theta.items():
            gradient[name] = np.empty(block.shape, block.dtype)
            x = block.copy()
            step = theta | {name: x}
            for k in np.ndindex(block.shape):
                h = CBRT_EPS * max(1.0, abs(block[k]))
                up, down = block[k] + h, block[k] - h
                x[k] = up
                plus = loss(step, data)
                x[k] = down
                gradient[name][k] = (plus - loss(step, data)) / (up - down)
                x[k] = block[k]
        return value, gradient

    return derivative


BACKEND = NumPy
