"""The whole cross product at tiny, and sizes that nobody listed: every cell is ok, or says why not and is believed only then."""

import json
import os
import re
import select
import subprocess

import pytest
from conftest import PLAIN, ROOT, is_sentence

from harness.cells import backend, cell, cells, known_status, problems, tasks
from harness.environments import is_made, python
from harness.measure import attempt, spec_of
from harness.processes import thread_environ
from harness.reference import code_folder, reference
from harness.run import PRESETS, _taken

TINY = sorted(cells("*@tiny"), key=lambda c: (c.backend, c.address))
# Odd numbers, other parameters: where indices and defaults go wrong. A new problem may add some, and needs none.
ODD = {
    "brusselator.rhs": ("N=9,alpha=0.1", "N=12,A=2.9,B=1.3,t=0.5"),
    "brusselator.imex": ("N=7,T=1.2,dt=0.02,alpha=0.1", "N=12,T=0.6,save=0.2,dt=0.01,A=2.9,B=1.3"),
    "brusselator.ude": ("N=7,T=1.2,dt=0.02,alpha=0.1", "N=12,T=0.6,save=0.2,dt=0.01"),
    "brusselator.implicit": ("N=7,T=1.2,dt=0.1,alpha=0.1", "N=6,T=1.2,save=0.2,A=2.9,B=1.3"),
    "brusselator.ode": ("N=5,T=1.2,save=0.4,spread=0.3,k0=5", "N=3,T=0.6,save=0.2,alpha=0.1,A=2.9,B=1.3"),
    "neural_ode.rhs": ("H=7", "H=1"),
    "neural_ode.rk4": ("H=13,m=3,b=3", "H=6,b=2"),
    "neural_ode.ode": ("H=7,rtol=1e-5,atol=1e-7,b=3", "H=6,b=2"),
    "shallow_ice.rhs": ("N=11", "N=20,A=1e-17"),
    "shallow_ice.ude": ("N=12,years=2,spy=3", "N=17,years=1"),
    "shallow_ice.semi_implicit": ("N=11,nst=4", "N=17,nst=7,A=9e-17"),
    "shallow_ice.halfar": ("N=7,ns=9", "N=13,ns=31"),
    "shallow_ice.pseudo_transient": ("N=9,steps=2,tol=1e-3", "N=7,steps=2,tol=1e-7"),
    "sparse_loss.fem_matvec": ("m=7,q=3", "m=10,q=5"),
    "sparse_loss.fem_solve": ("m=7,q=3", "m=10,q=5"),
    "sparse_loss.tight_binding": ("nx=3,ny=5", "nx=2,ny=2"),
    "sparse_loss.kpm": ("nx=5,ny=3,K=7", "nx=2,ny=3,K=2"),
}


SERVER = """
import json, os, sys
from harness import cell_protocol, worker
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    spec = json.loads(line)
    try:
        if spec["backend"] != "numpy":  # compiled once for the references and the cells
            cell_protocol.construct(spec).keep_compiled(cell_protocol.implementation_module(spec), spec["code"])
        result = cell_protocol.measure(spec, lambda stage: None)
    except BaseException as e:
        result = worker.failure(e)
    print(json.dumps(worker.finite(result)), file=answers, flush=True)
"""
LIMIT_S = 120.0
OWN_LIMIT_S = 900.0  # in an environment of its own: PyTensor compiles a scan for minutes


class Server:
    """One process for all cells of a backend: every check of the protocol is made, and the library is imported once."""

    def __init__(self, library, folder):
        environ = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}  # where compilers leave files
        environ |= thread_environ(1) | backend(library).environ(1)
        self.library, pipe = library, subprocess.PIPE
        words = [python(backend(library)), "-c", SERVER]
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=environ, text=True)

    def measure(self, c, whole):
        spec = spec_of(c, reference(c), budget=0.01 if whole else 0.0, least=1)
        spec["code"] = str(code_folder(c, c.backend))
        self.process.stdin.write(json.dumps(spec) + "\n")
        self.process.stdin.flush()
        limit = LIMIT_S if backend(c.backend).env == "main" else OWN_LIMIT_S
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else ""
        assert line, f"{c.address}: the process {'ended' if ready else f'said nothing for {limit:.0f} s'}."
        return json.loads(line)

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def quickly(tmp_path_factory):
    """Measures a cell as a run would, only shorter, and not in a process of its own. Where it is not the whole protocol, the
    gradient is judged and nothing is timed, so that no primal is compiled."""
    server = None

    def run(c, whole=True):
        nonlocal server
        if server and (server.library != c.backend or server.process.poll() is not None):
            server.close()
            server = None
        server = server or Server(c.backend, tmp_path_factory.mktemp(c.backend))
        try:
            return server.measure(c, whole)
        except BaseException:
            server.close()
            server = None
            raise

    yield run
    if server:
        server.close()


def is_ok(result):
    assert result["status"] == "ok", result["reason"]
    assert result["error"] is not None


COMPILED = [f"{problem}.{next(iter(tasks(problem)))}" for problem in problems()[:2]]
primals = set()  # that were run: strategies of a form share theirs, but those that bring their own


@pytest.mark.parametrize("c", TINY, ids=lambda c: c.address)
def test_every_cell_is_ok_or_says_why_not(c, quickly):
    status, reason = known_status(c)
    slow = os.environ.get("ADPHYS_SLOW")
    if not (slow or _taken(c, PRESETS["default"].ways)):
        pytest.skip("a second form in a second strategy is a cell of the full preset alone; ADPHYS_SLOW=1 runs it")
    if not (slow or status) and (c.backend, c.strategy) == ("torch", "compile") and c.name not in COMPILED:
        pytest.skip("C++ for every task takes minutes, so it is the first task of two problems; ADPHYS_SLOW=1 runs all")
    if status == "unsupported":
        if not is_made(backend(c.backend)):
            pytest.skip(f"the attempt needs the environment {backend(c.backend).env}")
        is_the_error_that_was_declared(c, reason)
    elif status:
        assert status in ("missing", "unavailable")
        is_sentence(reason)
    else:
        own = any(hasattr(backend(c.backend), f"{c.strategy}_{kind}") for kind in ("primal", "given"))
        primal = c.name, c.backend, c.form, own and c.strategy
        new = primal not in primals
        primals.add(primal)
        is_ok(quickly(c, whole=new))


# the measure of all others at both, the others at one each
AT = {"numba/adjoint": (0, 1), "jax/reverse": (0,), "torch/reverse": (1,), "casadi/tape": (1,), "enzyme/reverse": (0,)}
AT |= {"casadi/interpolating": (1,), "casadi/sensitivity": (0,), "scipy/quadrature": (0,), "scipy/interpolating": (1,)}


@pytest.mark.parametrize(
    "address", [f"{task}/{way}@{sizes[k]}" for way, at in AT.items() for task, sizes in ODD.items() for k in at]
)
def test_sizes_that_nobody_listed(address, quickly):
    c = cell(address)
    if known_status(c)[0]:
        pytest.skip(known_status(c)[1])
    is_ok(quickly(c, whole=c.backend == "numba"))


# An author who says `unsupported` is believed when the attempt fails with the error that his sentence quotes


def is_the_error_that_was_declared(c, reason):
    """The sentence quotes the error in backquotes, as in `NotImplementedError: no rule for svd`."""
    quoted = re.findall(r"`([^`]+)`", is_sentence(reason))
    assert quoted, f"{c.address} is unsupported; quote the error of the attempt in backquotes."
    result = attempt(c, 120.0)
    status, said = result["status"], result["reason"]
    assert status in ("error", "crashed", "invalid", "diverged", "oom", "timeout"), (
        f"{c.address} is declared unsupported, and is {status}."
    )
    assert any(part in said for part in quoted), f"{c.address}: the attempt said {said}"


@pytest.mark.parametrize(
    "sentence, holds",
    [
        ("Plain has no forward mode (`NotImplementedError: plain has no forward mode`).", True),
        ("Plain has no forward mode (`ValueError`).", False),
        ("Plain has no forward mode.", False),
    ],
)
def test_an_attempt_shows_whether_the_sentence_is_true(tree, sentence, holds):
    tree.write("backends/plain_backend.py", PLAIN)
    code = f"""
from problems import Implementation
from problems.brusselator import rhs
IMPLEMENTATION = {{"rhs": {{"array": Implementation(rhs, unsupported={{"forward": {sentence!r}}})}}}}
"""
    tree.write("problems/brusselator/brusselator_plain.py", code)
    script = f"""
import sys
sys.path[:0] = [{str(__file__.rpartition("/")[0])!r}]
from harness.cells import cell
from harness.measure import measure
from test_conformance import is_the_error_that_was_declared
c = cell("brusselator.rhs/plain/forward@tiny")
record = measure(c, budget=0.01, number=1, limit=60.0)
assert record.status == "unsupported" and record.reason == {sentence!r} and record.processes == []
try:
    is_the_error_that_was_declared(c, record.reason)
    print("holds")
except AssertionError as e:
    print(e)
"""
    done = tree.python("-c", script)
    assert (done.stdout.strip() == "holds") == holds, done.stdout + done.stderr
