"""PyTensor: a symbolic graph of whole arrays, differentiated as a graph and rewritten, then compiled by Numba."""

import os
import tempfile

import numpy as np

from backends import Backend


class PyTensor(Backend):
    requires = ("pytensor", "numba", "numpy", "scipy")
    env = "pytensor"  # it wants numba <= 0.65.1
    pins = (
        "cons==0.4.7",
        "etuples==0.3.10",
        "filelock==4.2.12",
        "llvmlite==0.47.0",
        "logical-unification==0.4.7",
        "miniKanren==1.0.5",
        "multipledispatch==1.0.0",
        "numba==0.65.1",
        "numpy==2.4.6",
        "pytensor==3.0.7",
        "scipy==1.17.1",
        "setuptools==65.5.0",
        "toolz==1.2.0",
        "typing_extensions==4.16.0",
    )

    @staticmethod
    def environ(threads):
        # Numba beats C (0.5 of its time, brusselator.rhs at N = 32; 0.05 through a scan, neural_ode.rk4 at H = 10), and then
        # nothing needs a C compiler; it compiles for 1.8 times as long. A cache in an empty folder saves nothing.
        return {"PYTENSOR_FLAGS": "mode=NUMBA,cxx=,numba__cache=False"}

    def __init__(self, device):
        os.environ["PYTENSOR_FLAGS"] += f",base_compiledir={tempfile.gettempdir()}"  # the worker's own, not one at home
        import pytensor

        self.pytensor = pytensor

    def put(self, array):
        return array

    def get(self, array):
        return np.asarray(array)

    def wait(self, result):
        return result

    def primal(self, loss):
        call = self._function(loss, lambda value, blocks: [])
        return lambda theta, data: call(theta, data)[0]

    def reverse(self, loss):
        call = self._function(loss, self.pytensor.grad)

        def derivative(theta, data):
            value, *gradient = call(theta, data)
            return value, dict(zip(theta, gradient, strict=True))

        return derivative

    def _function(self, loss, gradient):
        """The graph is built from the shapes at the first call; what has a type is not checked again in each."""
        built = []

        def call(theta, data):
            if not built:
                built.append(self._build(loss, gradient, theta, data))
            return built[0](*theta.values(), *data.values())

        return call

    def _build(self, loss, gradient, theta, data):
        tensor = self.pytensor.tensor.tensor
        inputs = [
            {name: tensor(name, dtype=a.dtype, shape=a.shape) for name, a in arrays.items()} for arrays in (theta, data)
        ]
        blocks = list(inputs[0].values())
        with self.pytensor.config.change_flags(floatX=blocks[0].dtype):  # the dtype of Python's scalars
            value = loss(*inputs)
            outputs = [value, *gradient(value, blocks)]
            variables = [*blocks, *inputs[1].values()]
            return self.pytensor.function(variables, outputs, on_unused_input="ignore", trust_input=True)


BACKEND = PyTensor
