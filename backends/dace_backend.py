"""DaCe (a beta: its reverse mode is experimental): loops as a dataflow graph, differentiated as a graph, compiled as C++.

A loss returns its program, whose arguments are the blocks of theta, the arrays of data and the loss S (1); DaCe has no 0-d
arrays, so a scalar comes as an array of one number. It adds to gradients, so they are zero before each call. Whole arrays
get through where no operation reads an array twice (u**3, not u * u * u) and no loop writes over what it read.
"""

import os
import sys
import tempfile

import numpy as np

from backends import Backend


class DaCe(Backend):
    requires = ("dace", "numpy", "scipy")
    env = "dace"  # a beta, and 18 libraries that nothing else here needs
    programs = {"reverse": ("g++", "c++", "clang++")}
    pins = (
        "astunparse==1.6.3",
        "click==8.5.1",
        "cmake==4.4.5",
        "dace==2.0.0b1",
        "dill==0.4.1",
        "distro==1.9.0",
        "fparser==0.2.5",
        "ml_dtypes==0.6.0",
        "mpmath==1.3.0",
        "networkx==3.6.1",
        "ninja==1.13.2",
        "numpy==2.4.6",
        "ordered-set==4.1.0",
        "packaging==26.3",
        "ply==3.11",
        "PyYAML==6.0.4",
        "scikit-build==0.19.1",
        "scipy==1.17.1",
        "six==1.17.0",
        "sympy==1.14.0",
        "typing_extensions==4.16.0",
    )

    def __init__(self, device):
        os.environ["DACE_CONFIG"] = f"{tempfile.gettempdir()}/dace.conf"  # else it writes one at home
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # cmake of the pins
        import dace
        import dace.autodiff

        self.dace = dace

    def put(self, array):
        return array.copy()  # a program takes no views

    def get(self, array):
        return np.asarray(array)

    def wait(self, result):
        return result

    def primal(self, loss):
        call = self._function(loss, False)
        return lambda theta, data: call(theta, data)[0]

    def reverse(self, loss):
        return self._function(loss, True)

    def _function(self, loss, differentiate):
        """The graph is built from the shapes at the first call, and compiled in the worker's own folder."""
        compiled = []

        def call(theta, data):
            S = np.zeros(1, next(iter(theta.values())).dtype)
            arrays = {name: a if a.ndim else np.full(1, a) for name, a in (theta | data).items()}
            gradient = {name: np.zeros_like(arrays[name]) for name in theta} if differentiate else {}
            if not compiled:
                graph = loss(theta, data).to_sdfg(**arrays, S=S)
                if differentiate:
                    self.dace.autodiff.add_backward_pass(graph, ["S"], list(theta))
                graph.build_folder = tempfile.mkdtemp()
                compiled.append(graph.compile())
            seeds = {f"gradient_{name}": g for name, g in (gradient | {"S": np.ones_like(S)}).items()}
            compiled[0](**arrays, S=S, **(seeds if differentiate else {}))
            return S[0], {name: g.reshape(theta[name].shape) for name, g in gradient.items()}

        return call


BACKEND = DaCe
