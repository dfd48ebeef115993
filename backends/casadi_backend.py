"""CasADi: a symbolic graph, built once and differentiated; its virtual machine runs it, or C code made of it.

CasADi's matrices are stored by columns. So that no number moves, an array comes as its transpose with all leading axes
merged into columns: (n,) as (n, 1), (n, m) as (m, n), (k, n, m) as (m, k n). Integer arrays do not come; see `prepare`.
"""

import shutil

import numpy as np

from backends import Backend, double_only

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
        return self._function(loss)

    def tape(self, loss):
        return self._function(loss, reverse)

    def tape_primal(self, loss):
        """Of the loss that is differentiated, where a strategy was given its own."""
        return self.primal(loss)

    def implicit(self, loss):
        return self.tape(loss)

    def implicit_primal(self, loss):
        return self.primal(loss)

    def interpolating(self, loss):
        """Of a graph whose integrator brings this adjoint."""
        return self._function(loss, around)

    def interpolating_primal(self, loss):
        return self.primal(loss)

    def sensitivity(self, loss):
        """Of a graph whose integrator brings them, 64 at once beside one solution."""
        return self._function(loss, beside)

    def sensitivity_primal(self, loss):
        return self.primal(loss)

    def compile(self, loss):
        return self._function(loss, reverse, self._by_compiler())

    def compile_primal(self, loss):
        return self._function(loss, None, self._by_compiler())

    def _by_compiler(self):
        compiler = next(filter(None, map(shutil.which, self.programs["compile"])))
        options = {"compiler": compiler, "flags": ["-O3", "-march=native"]}
        return {"jit": True, "compiler": "shell", "jit_options": options}

    def _function(self, loss, differentiate=None, options=None):
        """The graph is built from the shapes at the first call. Buffer() then runs on NumPy's memory without copies."""
        built = []

        def call(theta, data):
            if not built:
                f = self._build(loss, theta, data, differentiate, options or {})
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

    def _build(self, loss, theta, data, differentiate, options):
        ca = self.casadi
        inputs = [
            {name: ca.MX.sym(name, *storage(a.shape)) for name, a in arrays.items() if a.dtype.kind == "f"}
            for arrays in (theta, data)
        ]
        double_only("CasADi", theta | data)
        value, blocks, fixed = loss(*inputs), list(inputs[0].values()), list(inputs[1].values())
        outputs = [value]
        if differentiate:  # a gradient must be dense to be copied out
            outputs += map(ca.densify, differentiate(ca, value, blocks, fixed))
        return ca.Function("f", [*blocks, *fixed], outputs, options)


def reverse(ca, value, blocks, fixed):
    """All blocks in one reverse pass through the graph."""
    inside = ca.Function("loss", [*blocks, *fixed], [value]).find_functions()
    if any(f.class_name() in INTEGRATORS for f in inside):
        raise TypeError("this graph holds an integrator, whose reverse is no reverse mode but its adjoint equation")
    return around(ca, value, blocks, fixed)


def around(ca, value, blocks, fixed):
    return ca.reverse([value], blocks, [[ca.MX(1)]])[0]


def beside(ca, value, blocks, fixed):
    """Forward mode, in which an integrator integrates the tangents beside the state."""
    ends = np.cumsum([0, *(block.numel() for block in blocks)]).tolist()

    def cut(x):
        return [ca.reshape(part, *block.shape) for part, block in zip(ca.vertsplit(x, ends), blocks, strict=True)]

    seeds = [cut(e) for e in ca.horzsplit(ca.MX(ca.DM.eye(ends[-1])))]
    return cut(ca.vertcat(*(tangent for (tangent,) in ca.forward([value], blocks, seeds))))


def numbers(arrays):
    """What a loss is given, with numbers in place of symbols."""
    import casadi as ca

    return {name: ca.DM(a.reshape(-1, a.shape[-1]).T) for name, a in arrays.items()}


def storage(shape):
    """Rows and columns."""
    return (shape[-1] if shape else 1), int(np.prod(shape[:-1]))


BACKEND = CasADi
