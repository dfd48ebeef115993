"""CasADi: a symbolic graph, built once and differentiated; its virtual machine runs it, or C code made of it.

CasADi's matrices are stored by columns. So that no number moves, an array comes as its transpose with all leading axes
merged into columns: (n,) as (n, 1), (n, m) as (m, n), (k, n, m) as (m, k n). Integer arrays do not come; see `prepare`.
"""

import shutil

import numpy as np

from backends import Backend

INTEGRATORS = ("CvodesInterface", "IdasInterface")  # what CasADi differentiates by an adjoint equation


class CasADi(Backend):
    requires = ("casadi", "numpy", "scipy")
    programs = {"compile": ("gcc", "clang", "cc")}

    def __init__(self, device):
        import casadi

        self.casadi = casadi

    def put(self, array):
        return array

    def get(self, array):
        return np.asarray(array)

    def wait(self, result):
        return result

    def primal(self, loss):
        return self._function(loss, False)

    def tape(self, loss):
        return self._function(loss, True)

    def tape_primal(self, loss):
        """Of the loss that is differentiated, where a strategy was given its own."""
        return self.primal(loss)

    def implicit(self, loss):
        return self.tape(loss)

    def implicit_primal(self, loss):
        return self.primal(loss)

    def interpolating(self, loss):
        """Of a graph whose integrator brings this adjoint."""
        return self._function(loss, True, around=True)

    def interpolating_primal(self, loss):
        return self.primal(loss)

    def compile(self, loss):
        return self._function(loss, True, self._by_compiler())

    def compile_primal(self, loss):
        return self._function(loss, False, self._by_compiler())

    def _by_compiler(self):
        compiler = next(filter(None, map(shutil.which, self.programs["compile"])))
        options = {"compiler": compiler, "flags": ["-O3", "-march=native"]}
        return {"jit": True, "compiler": "shell", "jit_options": options}

    def _function(self, loss, differentiate, options=None, around=False):
        """The graph is built from the shapes at the first call. Buffer() then runs on NumPy's memory without copies."""
        built = []

        def call(theta, data):
            if not built:
                f = self._build(loss, theta, data, differentiate, options or {}, around)
                built.extend([f, *f.buffer()])
            _, buffer, run = built
            arrays = [np.ascontiguousarray(a) for a in (*theta.values(), *data.values()) if a.dtype.kind == "f"]
            out = [np.empty(())]
            if differentiate:
                out += [np.empty(a.shape) for a in theta.values()]
            for i, a in enumerate(arrays):
                buffer.set_arg(i, memoryview(a))
            for i, a in enumerate(out):
                buffer.set_res(i, memoryview(a))
            run()
            return (out[0], dict(zip(theta, out[1:], strict=True))) if differentiate else out[0]

        return call

    def _build(self, loss, theta, data, differentiate, options, around):
        ca = self.casadi
        inputs = [
            {name: ca.MX.sym(name, *storage(a.shape)) for name, a in arrays.items() if a.dtype.kind == "f"}
            for arrays in (theta, data)
        ]
        for name, a in (theta | data).items():
            if a.dtype == np.float32:
                raise TypeError(f"CasADi computes in float64 only, and {name} is float32")
        value = loss(*inputs)
        blocks = list(inputs[0].values())
        outputs = [value]
        if differentiate and not around:
            inside = ca.Function("loss", [*blocks, *inputs[1].values()], outputs).find_functions()
            if any(f.class_name() in INTEGRATORS for f in inside):
                raise TypeError(
                    "this graph holds an integrator, whose reverse is no reverse mode but its adjoint equation"
                )
        if differentiate:  # all blocks in one reverse pass; a gradient must be dense to be copied out
            outputs += map(ca.densify, ca.reverse([value], blocks, [[ca.MX(1)]])[0])
        return ca.Function("f", [*blocks, *inputs[1].values()], outputs, options)


def storage(shape):
    """Rows and columns."""
    return (shape[-1] if shape else 1), int(np.prod(shape[:-1]))


BACKEND = CasADi
