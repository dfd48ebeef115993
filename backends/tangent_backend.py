"""Tangent: source to source. It writes a Python function that runs the loss and then backwards, or tangents beside it.

It reads the source of functions, of no lambda: it gets the function that was bound to its size.
"""

import sys

import numpy as np

from backends import Backend


class Tangent(Backend):
    namespace = {}  # it reads NumPy's own names
    requires = ("tangent-ad", "numpy", "scipy")

    @staticmethod
    def environ(threads):
        return {"TANGENT_DISK_CACHE": "0"}  # else a first call would find what another process wrote

    def __init__(self, device):
        # It imports all that it finds: seconds, and memory, that are not its own.
        hidden = [name for name in ("torch", "jax", "matplotlib") if name not in sys.modules]
        sys.modules.update(dict.fromkeys(hidden))
        try:
            import tangent
        finally:
            for name in hidden:
                del sys.modules[name]
        self.tangent = tangent

    def put(self, array):
        return array

    def get(self, array):
        return np.asarray(array)

    def wait(self, result):
        return result

    def primal(self, loss):
        return loss

    def reverse(self, loss):
        gradient = self.tangent.grad(loss.of, preserve_result=True)

        def derivative(theta, data):
            blocks, value = gradient(theta, data, *loss.static)
            return value, blocks

        return derivative

    def forward(self, loss):
        """One jvp an entry: it takes one tangent at a time."""
        jvp = self.tangent.jvp(loss.of, preserve_result=True, check_dims=False)

        def derivative(theta, data):
            seed = {name: np.zeros_like(block) for name, block in theta.items()}
            gradient = {name: np.empty_like(block) for name, block in theta.items()}
            for name, block in seed.items():
                for k in np.ndindex(block.shape):
                    block[k] = 1
                    gradient[name][k], value = jvp(theta, data, *loss.static, seed)
                    block[k] = 0
            return value, gradient

        return derivative


BACKEND = Tangent
