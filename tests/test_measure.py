"""The protocol of a cell against everything that ever went wrong in published benchmarks: each fault is made, and caught."""

import contextlib
import fcntl
import json
import math
import os
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import PLAIN, Tree, is_sentence
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness import cell_protocol, cells, judge, processes
from harness.measure import attempt
from problems import gold

STATEMENT = """
from typing import NamedTuple
import numpy as np
from problems import Task, gold

class Size(NamedTuple):
    N: int

def inputs(size):
    return {"x": 1 + gold(size.N), "s": np.array(0.5)}, {"w": gold(size.N, 3), "spare": gold(4)}

def cube(theta, data, size):
    return np.sum(data["w"] * theta["x"] ** 3) * theta["s"]

def flat(theta, data, size):
    return np.sum(data["w"] * theta["x"] ** 3)

def broken(size):
    raise ValueError("no such inputs")

def exact(theta, data, size):  # of a solution from which the statement is 3 % away
    x, w, s = theta["x"], data["w"], theta["s"]
    return cube(theta, data, size) / 1.03, {"x": 3 * w * x**2 * s / 1.03, "s": np.sum(w * x**3) / 1.03}

sizes = {"tiny": Size(6), "small": Size(20000), "large": Size(400000)}
TASKS = {name: Task(Size, sizes, make, {"array": f}, 1e-10, 1e-5)
         for name, make, f in (("cube", inputs, cube), ("flat", inputs, flat), ("broken", broken, cube))}
TASKS["solved"] = Task(Size, sizes, inputs, {"array": cube}, 0.1, 0.1, reference="continuous", exact=exact)
"""

# One form a fault. All but the last lines of each are right.
IMPLEMENTATION = '''
import ctypes, os, sys, time
import numpy as np
from problems import Implementation

def cube(theta, data, size):
    return float(np.sum(data["w"] * theta["x"] ** 3) * theta["s"])

def right(theta, data, size):
    x, w, s = theta["x"], data["w"], theta["s"]
    return cube(theta, data, size), {"x": 3 * w * x**2 * s, "s": np.array(np.sum(w * x**3))}

def change(**blocks):
    """The right gradient with a block changed."""
    def derivative(theta, data, size):
        loss, gradient = right(theta, data, size)
        return loss, gradient | {name: f(gradient[name]) for name, f in blocks.items()}
    return derivative

def flat_right(theta, data, size):
    x, w = theta["x"], data["w"]
    return float(np.sum(w * x**3)), {"x": 3 * w * x**2, "s": np.array(0.0)}

def put_nan(g):
    g[1] = np.nan
    return g

def first(g):
    """One entry wrong, far below what a norm over all blocks would show."""
    g[0] *= 1 + 1e-7
    return g

def do(what):
    """Something on the way."""
    def derivative(theta, data, size):
        what(theta, data)
        return right(theta, data, size)
    return derivative

def full(theta, data):
    raise MemoryError("no more")

def torn(theta, data):
    """Killed while the worker writes a line."""
    with open(sys.argv[2], "a") as f:
        f.write('{"result": {"status": "o')
    os._exit(3)

def forever(theta, data):
    while True:
        pass

def mutate_data(theta, data):
    data["spare"] += 1.0  # which no formula reads

def mutate_theta(theta, data):
    theta["x"][0] += 1e-14  # which no gate would show

def late(theta, data, size, calls=[]):
    """Right when it is checked, wrong afterwards."""
    calls.append(1)
    loss, gradient = right(theta, data, size)
    return loss, gradient | {"x": gradient["x"] * (1 + 1e-9 * (len(calls) > 1))}

def threads(theta, data, size):
    names = [name for name in os.environ if name.endswith("_NUM_THREADS")]
    raise ValueError(f"{len(os.sched_getaffinity(0))} processor, {sorted({os.environ[name] for name in names})} of {len(names)}")

def slow(theta, data, size):
    time.sleep(0.3)
    return right(theta, data, size)

def other_loss(theta, data, size):
    return cube(theta, data, size) * (1 + 1e-7)

def two_numbers(theta, data, size):
    return np.ones(2), right(theta, data, size)[1]

def wrong_loss(theta, data, size):
    loss, gradient = right(theta, data, size)
    return loss + 1e-3, gradient

def buffers(structure, size):
    assert structure["x"].shape == (size.N,) and not hasattr(structure["x"], "sum")
    return {"states": [np.zeros((3, size.N))], "pattern": np.zeros(size.N, int)}

def hungry(theta, data, size, work):
    """Two temporaries of N^2 / 50 numbers, both alive at once."""
    a = np.ones(size.N * size.N // 50)
    b = a + 1
    return right(theta, data, size)

def many(theta, data, size, kept=[]):
    """N states of 16 KiB: the allocator keeps their pages, because what was allocated last stays."""
    states = [np.ones(2048) for _ in range(size.N)]
    kept.append(np.ones(8000))
    return right(theta, data, size)

def hungry_cube(theta, data, size, work):
    return cube(theta, data, size)
'''

DERIVATIVES = {  # form -> the derivative that it is
    "right": "right",
    "zero": "change(x=lambda g: 0 * g)",
    "nan": "change(x=put_nan)",
    "scaled": "change(x=lambda g: g * (1 + 1e-7))",
    "entry": "change(x=first)",
    "scalar": "change(s=lambda g: -g)",
    "fifth": "change(x=lambda g: g * 1.2)",
    "single": 'change(x=lambda g: g.astype("f4"))',
    "shape": "change(x=lambda g: g[:, None])",
    "absent": 'lambda *a: (right(*a)[0], {"x": right(*a)[1]["x"]})',
    "nothing": "lambda *a: None",
    "mutate_data": "do(mutate_data)",
    "mutate_theta": "do(mutate_theta)",
    "late": "late",
    "slow": "slow",
    "threads": "threads",
    "many": "many",
    "wrong_loss": "wrong_loss",
    "two_numbers": "two_numbers",
    "segfault": "do(lambda *a: ctypes.string_at(0))",
    "exit": "do(lambda *a: os._exit(3))",
    "raises": "do(lambda *a: 1 // 0)",
    "forever": "do(forever)",
    "memory": "do(full)",
    "torn": "do(torn)",
}
FORMS = [f'"{name}": Implementation(cube, strategies={{"adjoint": {what}}})' for name, what in DERIVATIVES.items()] + [
    '"primal": Implementation(other_loss, strategies={"adjoint": right})',
    '"hungry": Implementation(hungry_cube, buffers, strategies={"adjoint": hungry})',
    '"prepare": Implementation(cube, lambda structure, size: structure["x"] + 1, strategies={"adjoint": right})',
    '"nan_stats": Implementation(cube, strategies={"adjoint": right}, stats=lambda *a: {"steps": float("nan")})',
    '"stats": Implementation(cube, strategies={"adjoint": right}, stats=lambda theta, data, size: {"steps": 7})',
]
ONE, FLAT = (f'{{"right": Implementation(cube, strategies={{"adjoint": {name}}})}}' for name in ("right", "flat_right"))
IMPLEMENTATION += f'IMPLEMENTATION = {{"cube": {{{", ".join(FORMS)}}}, "flat": {FLAT}, "broken": {ONE}, '
IMPLEMENTATION += f'"solved": {{{", ".join(FORMS)}}}}}'


@pytest.fixture(scope="module")
def faults(module_tree) -> Tree:
    module_tree.write("backends/plain_backend.py", PLAIN)
    module_tree.write("problems/faults/__init__.py", STATEMENT)
    module_tree.write("problems/faults/faults_plain.py", IMPLEMENTATION)
    return module_tree


def fault(name, task="cube", size="tiny"):
    return f"faults.{task}/plain{'' if name == 'right' else '.' + name}/adjoint@{size}"


def has_no_time(said):
    assert said["status"] != "ok" and said["code"] == 1
    assert said["first_call_s"] is said["median_s"] is said["primal_median_s"] is None
    return is_sentence(said["reason"])


def test_a_right_gradient_is_ok(faults):
    """The control: what is refused below is refused for its fault."""
    said = faults.gradient(fault("right"))
    assert (said["status"], said["reason"], said["code"]) == ("ok", None, 0)
    assert min(said["first_call_s"], said["median_s"], said["primal_median_s"]) > 0
    x, w = 1 + gold(6), gold(6, 3)
    assert said["loss"] == pytest.approx(np.sum(w * x**3) / 2, rel=1e-14)
    want = {"x": 1.5 * w * x**2, "s": np.sum(w * x**3)}
    for name, block in said["blocks"].items():
        assert block["size"] == np.size(want[name])
        assert block["norm"] == pytest.approx(np.linalg.norm(want[name]), rel=1e-14)
        assert block["dot_gold5"] == pytest.approx(np.sum(want[name] * gold(np.size(want[name]), 5)), rel=1e-13)
        assert block["error"] < 1e-14
    assert said["error"] == max(block["error"] for block in said["blocks"].values())


@pytest.mark.parametrize(
    "name, block, error",
    [("zero", "x", 1.0), ("scaled", "x", 1e-7), ("entry", "x", None), ("scalar", "s", 2.0)],
)
def test_a_wrong_gradient_is_wrong_with_its_error_and_without_a_time(faults, name, block, error):
    said = faults.gradient(fault(name))
    assert said["status"] == "wrong"
    assert f"gradient of {block} " in has_no_time(said)
    assert ("is zero" in said["reason"]) == (name == "zero")
    assert said["loss"] is not None and said["error"] == said["blocks"][block]["error"] > 1e-10
    assert error is None or said["error"] == pytest.approx(error, rel=1e-6)
    assert all(b["error"] < 1e-12 for other, b in said["blocks"].items() if other != block)


def test_a_nan_is_wrong_and_null(faults):
    said = faults.gradient(fault("nan"))
    assert said["status"] == "wrong" and "not finite" in has_no_time(said)
    assert said["blocks"]["x"]["norm"] is said["blocks"]["x"]["error"] is said["error"] is None


@pytest.mark.parametrize(
    "name, part",
    [
        ("single", "float32"),
        ("shape", "shape"),
        ("absent", "blocks"),
        ("two_numbers", "loss"),
        ("mutate_data", "input spare was changed"),
        ("mutate_theta", "changed"),
        ("late", "changed between the first call and the last"),
        ("primal", "primal"),
    ],
)
def test_a_broken_rule_of_measurement_is_invalid(faults, name, part):
    said = faults.gradient(fault(name))
    assert said["status"] == "invalid" and part in has_no_time(said)


def test_a_wrong_loss_is_wrong(faults):
    said = faults.gradient(fault("wrong_loss"))
    assert said["status"] == "wrong" and "loss" in has_no_time(said)
    assert said["error"] < 1e-12


@pytest.mark.parametrize("size", ["tiny", "N=50"])
def test_a_continuous_task_is_judged_by_the_derivative_of_its_solution(faults, size):
    """Where its own program is 3 % away from it, that is a column; what is 24 % away is refused."""
    at = fault("right", "solved", size), fault("fifth", "solved", size), "faults.solved/numpy/complex_step@" + size
    right, wrong, stepped = faults.measure(*at)
    for said in (right, stepped):
        assert said["status"] == "ok" and said["judge"] == "the derivative of the solution itself"
        assert [block["error"] for block in said["blocks"].values()] == pytest.approx([0.03, 0.03], rel=1e-9)
    assert wrong["status"] == "wrong" and wrong["blocks"]["x"]["error"] == pytest.approx(0.236, rel=1e-9)
    assert "gradient of x has the relative error 2.4e-01" in wrong["reason"]


def test_a_reference_that_is_zero_can_check_nothing(faults):
    (said,) = faults.measure(fault("right", "flat"))
    assert said["status"] == "invalid" and "zero" in said["reason"] and said["processes"] == []


def test_inputs_that_cannot_be_made_are_an_error_of_the_cell(faults):
    said = faults.gradient(fault("right", "broken"))
    assert (said["status"], said["code"]) == ("error", 1) and "no such inputs" in said["reason"]
    said = faults.gradient(fault("right", size="N=100000000000000"))
    assert (said["status"], said["code"]) == ("oom", 1)


@pytest.mark.parametrize(
    "name, status, parts",
    [
        ("segfault", "crashed", ["SIGSEGV", "first call"]),
        ("exit", "error", ["code 3", "first call"]),
        ("torn", "error", ["code 3", "first call"]),
        ("nan_stats", "error", ["stats.steps", "number"]),
        ("raises", "error", ["ZeroDivisionError"]),
        ("nothing", "error", ["TypeError"]),
        ("prepare", "error", ["TypeError"]),  # it may know shapes, never the values
        ("memory", "oom", ["MemoryError", "no more"]),
    ],
)
def test_however_a_worker_ends_the_cell_has_a_status_and_a_sentence(faults, name, status, parts):
    said = faults.gradient(fault(name))
    assert (said["status"], said["code"], said["median_s"]) == (status, 1, None)
    assert all(part in said["reason"] for part in parts), said["reason"]


@pytest.mark.parametrize("way", ["casadi/interpolating", "casadi.idas/interpolating", "jax.diffrax-kvaerno5/reverse"])
def test_a_library_s_solver_that_gives_up_is_diverged(way):
    result = attempt(cells.cell(f"brusselator.ode/{way}@N=3,rtol=1e-16,atol=1e-18"), 120.0)
    assert result["status"] == "diverged"
    assert "gave up" in is_sentence(result["reason"]) and "give a larger rtol or atol" in result["reason"]


def test_a_worker_that_hangs_is_a_timeout(faults):
    (said,) = faults.measure(fault("forever"), limit=2.0)
    assert said["status"] == "timeout" and "2 s" in said["reason"] and "first call" in said["reason"]
    assert said["processes"] == [] and 2 <= said["measured_s"] <= said["wall_s"]


def test_entries_too_many_for_the_limit_are_a_timeout_after_two_primals(tree):
    """Of NumPy, and of any backend that says that it is one such."""
    tree.write("backends/other_backend.py", (tree.folder / "backends/numpy_backend.py").read_text())
    code = "from problems import Implementation\nfrom problems.brusselator import rhs\n"
    code += 'IMPLEMENTATION = {"rhs": {"array": Implementation(rhs)}}\n'
    tree.write("problems/brusselator/brusselator_other.py", code)
    for found in tree.measure(
        *(f"brusselator.rhs/{name}/complex_step@N=200" for name in ("numpy", "other")), limit=10.0
    ):
        assert (found["status"], found["processes"]) == ("timeout", [])
        said = r"Not run: one complex primal takes \S+ s, and each of the 80003 entries of theta needs 1; .* is 10 s\."
        assert re.fullmatch(said, found["reason"])


def test_a_library_that_is_absent_is_unavailable(tree):
    """Not installed; and installed but not importable, which only constructing it shows."""
    tree.write("backends/absent_backend.py", PLAIN.replace('("numpy",)', '("no_such_library",)'))
    tree.write("backends/lame_backend.py", PLAIN.replace("        pass", "        import no.such.part"))
    tree.write("problems/faults/__init__.py", STATEMENT)
    for name in ("absent", "lame"):
        tree.write(f"problems/faults/faults_{name}.py", IMPLEMENTATION)
    for name, part in (("absent", "no_such_library"), ("lame", "No module named 'no'")):
        done = tree.adphys("gradient", fault("right").replace("plain", name), "--json")
        said = json.loads(done.stdout)
        assert (said["status"], said["loss"], done.returncode) == ("unavailable", None, 2)
        assert part in said["reason"] and is_sentence(done.stderr.removesuffix("\n")) == said["reason"]


# A worker, watched from outside


def test_what_a_record_holds(faults):
    """Every sample, the reference kernel beside each, both first calls, memory, what the worker ran under."""
    (said,) = faults.measure(fault("stats"), number=2, budget=0.1, least=3)
    assert said["status"] == "ok" and said["judge"] == "complex step of the statement" and said["gate"] == 1e-10
    assert len(said["processes"]) == 2
    for process in said["processes"]:
        assert process["stats"] == {"steps": 7}
        for samples in (process["derivative"], process["primal"]):
            assert len(samples["wall"]) == len(samples["cpu"]) == len(samples["reference"]) >= 3
            assert min(samples["wall"]) > 0 and min(samples["reference"]) > 0
    block = said["blocks"]["x"]
    x, w = 1 + gold(6), gold(6, 3)
    assert block["reference_norm"] == pytest.approx(np.linalg.norm(1.5 * w * x**2), rel=1e-12)
    assert block["reference_nonzero"] == 1.0
    assert said["environ"]["OMP_NUM_THREADS"] == "1" and len(said["cpus"]) == 1
    assert said["versions"]["numpy"] == np.__version__
    assert 0 < said["measured_s"] <= said["wall_s"]


def test_memory_grows_with_the_size_and_counts_work(faults):
    sizes = (5_000, 10_000, 20_000)
    found = faults.measure(*(fault("hungry", size=f"N={N}") for N in sizes), budget=0.01)
    for N, said in zip(sizes, found, strict=True):
        memory = said["processes"][0]["memory"]
        assert memory["work"] == (3 + 1) * N * 8
        needs = 2 * 8 * N * N // 50
        assert needs <= memory["peak"] + 2**20 and memory["peak"] <= 1.3 * needs + 4 * 2**20


def test_memory_of_many_small_states_is_seen(faults):
    (said,) = faults.measure(fault("many", size="N=2000"), budget=0.01)
    assert 0.95 < said["processes"][0]["memory"]["peak"] / (2000 * 2048 * 8) < 1.2


def test_the_first_call_is_timed_on_its_own(faults):
    said = faults.gradient(fault("slow"))
    assert said["status"] == "ok" and said["first_call_s"] >= 0.3 and said["median_s"] >= 0.3 > said["primal_median_s"]


def test_threads_are_in_force_before_any_import(faults):
    """And the worker is pinned to as many processors as it has threads."""
    assert "1 processor, ['1'] of 5" in faults.gradient(fault("threads"))["reason"]


def test_of_two_cells_side_by_side_one_takes_samples(faults):
    """The other waits before its memory pass, and is measured when the turn is given back."""
    (faults.cache / "turn").touch()
    with open(faults.cache / "turn") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        process = faults.start("-m", "harness", "gradient", fault("right"), "--json")
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=8)
        last = [psutil.Process(p.pid).cmdline()[-1] for p in psutil.Process(process.pid).children()]
        assert [json.loads(line)["stage"] for line in Path(last[0]).read_text().splitlines()][-1] == "correctness"
    out, err = process.communicate()
    assert json.loads(out)["status"] == "ok", err


def test_lanes_share_no_core(monkeypatch):
    lanes = processes.lanes(range(os.cpu_count() or 1))
    cores = [Path(f"/sys/devices/system/cpu/cpu{lane[0]}/topology/thread_siblings_list").read_text() for lane in lanes]
    assert 1 <= len(cores) <= 2 and len(set(cores)) == len(cores)
    monkeypatch.setattr(processes, "everywhere", lambda: [0])
    assert processes.lanes() == [[0]]


def test_a_reference_is_made_once(tree, tmp_path):
    tree.cache = tmp_path / "own"
    tree.write("problems/faults/__init__.py", STATEMENT)
    tree.write("problems/faults/faults_numba.py", IMPLEMENTATION)
    code = """
from harness import processes
from harness.cells import cell
from harness.measure import measure
run, modes = processes.run, []
processes.run = lambda mode, *rest: modes.append(mode) or run(mode, *rest)
for way in ("difference@tiny", "complex_step@tiny", "difference@N=5"):
    record = measure(cell("faults.cube/numpy/" + way), budget=0.001, number=1, limit=60.0, least=1)
    assert record.status == "ok" and record.judge == "the hand adjoint", record
    modes.append("|")
print(*modes)
"""
    adjoint_and_complex_step_at_tiny, along_directions = "inputs gradient gradient", "inputs gradient directions"
    first = f"{adjoint_and_complex_step_at_tiny} measure | measure | {along_directions} measure |"
    for want in (first, "measure | measure | measure |"):
        done = tree.python("-c", code)
        assert done.stdout.strip() == want, done.stderr
    tree.edit("problems/faults/__init__.py", "np.array(0.5)", "np.array(0.25)")
    assert tree.python("-c", code).stdout.strip() == first  # of other physics


def test_a_reference_that_failed_is_not_tried_again(tree, tmp_path):
    """By the same process, which is a run; but what gave way to those beside it is, once it is alone."""
    tree.cache = tmp_path / "own"
    tree.write(
        "problems/faults/__init__.py", STATEMENT.replace("return np.sum", "raise ValueError('no')\n    return np.sum")
    )
    tree.write("backends/plain_backend.py", PLAIN)
    tree.write("problems/faults/faults_plain.py", IMPLEMENTATION)
    code = """
from harness import processes
from harness.cells import cell
from harness.measure import measure
run, modes = processes.run, []
processes.run = lambda mode, *rest: modes.append(mode) or run(mode, *rest) | extra
for extra in ({"crowded": True}, {}):
    for form in ("", ".zero", ".nan"):
        record = measure(cell(f"faults.cube/plain{form}/adjoint@tiny"), budget=0.001, number=1, limit=60.0, least=1)
        assert record.status == "error" and "ValueError: no" in record.reason, record
    modes.append("|")
print(*modes)
"""
    done = tree.python("-c", code)
    assert done.stdout.strip() == "inputs gradient gradient gradient | gradient |", done.stdout + done.stderr


def test_workers_side_by_side_share_the_memory(tree, tmp_path):
    """Two of which each alone would fit: the larger gives way, and the other ends."""
    fill = "def inputs(size):\n    a, size = np.ones(size.N), Size(6)\n    time.sleep(5)"
    tree.write("problems/faults/__init__.py", "import time" + STATEMENT.replace("def inputs(size):", fill))
    code = f"""
import psutil
from concurrent.futures import ThreadPoolExecutor
from harness import processes
processes.MEMORY_SHARE = 600 * 2**20 / psutil.virtual_memory().total
def run(N):
    spec = {{"problem": "faults", "task": "cube", "size": {{"N": N}}, "save": f"{tmp_path}/{{N}}"}}
    return processes.run("inputs", spec, {{}}, 1, 60.0)
large, small = (N * 2**20 // 8 for N in (400, 150))
with ThreadPoolExecutor(2) as pool:
    print(*(found["status"] for found in pool.map(run, (large, small))), run(large)["status"])
"""
    done = tree.python("-c", code)
    assert done.stdout.strip() == "oom ok ok", done.stdout + done.stderr


AS_IS = """
from harness.cells import cell
from harness.measure import as_is
from dataclasses import replace
for form in ("array", "inplace"):
    found = as_is(replace(cell("brusselator.rhs/{library}@tiny"), form=form), 60.0)
    print(found.status, found.reason)
"""


def test_the_statement_as_it_is_runs_or_is_refused(tree):
    done = tree.python("-c", AS_IS.replace("{library}", "autograd/tape"))
    assert done.stdout == "ok \nerror ValueError: setting an array element with a sequence.\n", done.stderr


def test_the_statement_as_it_is_may_come_back_wrong(tree):
    half = """
    namespace = {}

    def reverse(self, loss):
        def derivative(theta, data):
            gradient = {name: np.zeros(block.shape) for name, block in theta.items()}
            return loss(theta, data), gradient
        return derivative

    def adjoint("""
    tree.write("backends/plain_backend.py", PLAIN.replace("\n    def adjoint(", half))
    tree.write(
        "problems/brusselator/brusselator_plain.py", "from problems import Implementation\nIMPLEMENTATION = {}\n"
    )
    code = AS_IS.replace(
        'cell("brusselator.rhs/{library}@tiny")', 'next(iter(cells("brusselator.rhs/plain/reverse@tiny")))'
    )
    done = tree.python("-c", code.replace("import cell\n", "import cells\n"))
    assert done.returncode == 0, done.stderr
    assert all(row.startswith("wrong The gradient of u is zero") for row in done.stdout.splitlines()), done.stdout


def test_a_statement_that_comes_back_right_with_its_inputs_changed_is_invalid(tree):
    spoil = """
    namespace = {}

    def reverse(self, loss):
        def derivative(theta, data):
            x, w, s = theta["x"], data["w"], theta["s"]
            out = loss(theta, data), {"x": 3 * w * x**2 * s, "s": np.array(np.sum(w * x**3))}
            data["spare"] += 1
            return out
        return derivative

    def adjoint("""
    tree.write("backends/plain_backend.py", PLAIN.replace("\n    def adjoint(", spoil))
    tree.write("problems/faults/__init__.py", STATEMENT)
    code = """
from harness.cells import cells
from harness.measure import as_is
from dataclasses import replace
found = as_is(replace(next(iter(cells("faults.cube/plain/reverse@tiny"))), form="array"), 60.0)
print(found.status, found.reason)
"""
    done = tree.python("-c", code)
    assert done.stdout == "invalid The input spare was changed by the call.\n", done.stdout + done.stderr


def test_a_worker_dies_with_its_parent(faults):
    """kill -9, then --resume: the cell of before must not run on beside those that are timed now."""
    code = f"from harness.cells import cell; from harness.measure import measure as m; m(cell('{fault('forever')}'), "
    parent = faults.start("-c", code + "budget=0.01, number=1, limit=300.0)")
    inside = psutil.Process(parent.pid)
    workers, deadline = [], time.monotonic() + 60
    while time.monotonic() < deadline and not workers:
        time.sleep(0.05)
        with contextlib.suppress(psutil.NoSuchProcess):  # the reference's, which ends
            workers = [w for w in inside.children() if w.cpu_times().user > 1.0]
    parent.kill()
    parent.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert gone and not alive


# Sabotage of the real ones


def test_a_hand_adjoint_with_one_sign_flipped_is_wrong_and_judges_nobody(tree):
    numba = "problems/brusselator/brusselator_numba.py"
    before, rhs_adjoint, after = (tree.folder / numba).read_text().partition("def rhs_adjoint(")
    tree.write(numba, before + rhs_adjoint + after.replace('"B": ', '"B": -', 1))
    for size in ("tiny", "N=12"):
        said = tree.gradient(f"brusselator.rhs/numba/adjoint@{size}")
        assert said["status"] == "wrong" and "gradient of B " in has_no_time(said)
        assert said["blocks"]["B"]["error"] > 0.1 and said["blocks"]["u"]["error"] < 1e-12
    for cell in ("torch/reverse@N=12", "numpy/difference@tiny"):
        (said,) = tree.measure(f"brusselator.rhs/{cell}")
        assert said["status"] == "ok" and said["judge"] == "complex step of the statement along directions"


def test_an_unwaited_timer_is_caught(tree):
    """JAX returns before it has computed; the same cell, waited for, is ok."""
    cell = "brusselator.rhs/jax/reverse@N=512"
    (waited,) = tree.measure(cell, budget=0.2)
    assert waited["status"] == "ok", waited["reason"]
    tree.edit("backends/jax_backend.py", "return self.jax.block_until_ready(result)", "return result")
    (unwaited,) = tree.measure(cell, budget=0.2)
    assert unwaited["status"] == "invalid" and "not waited for" in is_sentence(unwaited["reason"])
    assert unwaited["processes"] == []


# The parts of the protocol, in this process


@given(cost=st.floats(1e-7, 2.0), budget=st.floats(1e-4, 3.0), least=st.integers(1, 4))
@settings(deadline=None)
def test_samples_are_calibrated_to_something_measurable(cost, budget, least):
    """A clock that only counts calls: 5 ms at least, however short a call is, and no more of the budget than need be."""
    assume(abs(cost / budget - 1) > 1e-5)
    spent = [0.0]

    def clock(call, number):
        spent[0] += number * cost
        return number * cost, number * cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_protocol, "clock", clock)
        patch.setattr(cell_protocol, "reference_kernel", lambda: 4e-4)
        patch.setattr(cell_protocol.gc, "collect", lambda: None)  # a tenth of a second in a process of many libraries
        patch.setattr(cell_protocol.time, "perf_counter", lambda: spent[0])
        found = cell_protocol.sample(print, budget, least, cell_protocol.once(print))
    times = cell_protocol.MOST_BUDGETS * budget / cost / found["number"]
    assume(abs(times - round(times)) > 1e-3)
    enough = max(1, math.ceil(times))  # samples that take MOST_BUDGETS
    assert len(found["wall"]) == len(found["cpu"]) == len(found["reference"]) >= min(least, enough)
    assert found["wall"] == pytest.approx([cost] * len(found["wall"]), rel=1e-5)
    sample = found["number"] * cost
    if cost >= budget:
        assert (found["number"], len(found["wall"])) == (1, min(least, enough))
    else:
        assert sample >= 0.99999 * 5e-3
        assert found["number"] == 1 or sample < 4 * max(5e-3, budget / 100, cost)
        assert len(found["wall"]) <= max(least, 100)


@given(cost=st.floats(1e-7, 0.05), late=st.integers(1, 12), by=st.floats(1e-3, 0.1))
@settings(deadline=None)
def test_one_preempted_call_does_not_end_the_calibration(cost, late, by):
    """The warm-up or any later one: samples are measurable nevertheless."""
    spent, calls = [0.0], [0]

    def clock(call, number):
        calls[0] += 1
        took = number * cost + by * (calls[0] == late)
        spent[0] += took
        return took, took

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_protocol, "clock", clock)
        patch.setattr(cell_protocol, "reference_kernel", lambda: 4e-4)
        patch.setattr(cell_protocol.gc, "collect", lambda: None)  # a tenth of a second in a process of many libraries
        patch.setattr(cell_protocol.time, "perf_counter", lambda: spent[0])
        found = cell_protocol.sample(print, 0.5, 1, cell_protocol.once(print))
    assert found["number"] * cost >= 0.99999 * 5e-3


@given(seed=st.integers(0, 2**32), size=st.integers(1, 300), log_error=st.integers(-14, 1))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_directional_and_whole_errors_estimate_the_same(seed, size, log_error):
    """One of at most four entries exactly; a longer one within what four normal directions allow (F(4, 4) > 900: 4e-6)."""
    rng = np.random.default_rng(seed)
    want = rng.standard_normal(size) * 10.0 ** rng.integers(-5, 5)
    got = want + 10.0**log_error * np.linalg.norm(want) / size**0.5 * rng.standard_normal(size)
    whole = judge.error(got, want, None, "u")
    along = judge.error(got, None, judge.directions("u", size) @ want, "u")
    if size <= judge.DIRECTIONS:
        assert along == pytest.approx(whole, rel=1e-12, abs=1e-15)
    else:
        assert whole / 30 - 1e-15 < along < 30 * whole + 1e-15


def test_directional_errors_are_right_on_average():
    ratios = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        want = rng.standard_normal(50)
        got = want + 1e-6 * rng.standard_normal(50)
        along = judge.error(got, None, judge.directions(f"block {seed}", 50) @ want, f"block {seed}")
        ratios.append(np.log(along / judge.error(got, want, None, "")))
    assert abs(np.mean(ratios)) < 4 * np.std(ratios) / 20


@given(seed=st.integers(0, 2**32), size=st.integers(1, 50), delta=st.floats(1e-12, 1e3))
@settings(deadline=None)
def test_a_gradient_scaled_has_that_error_both_ways(seed, size, delta):
    want = 1 + np.random.default_rng(seed).random(size)
    for whole, along in ((want, None), (None, judge.directions("u", size) @ want)):
        assert judge.error(want * (1 + delta), whole, along, "u") == pytest.approx(delta, rel=1e-3)


@given(size=st.integers(1, 20), k=st.integers(0, 19), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_cannot_be_compared_has_an_infinite_error(size, k, bad):
    want = np.ones(size)
    got = want.copy()
    got[k % size] = bad
    D = judge.directions("u", size)
    assert judge.error(got, want, None, "u") == judge.error(got, None, D @ want, "u") == np.inf
    assert judge.error(want, 0 * want, None, "u") == judge.error(want, None, D @ (0 * want), "u") == np.inf
    assert judge.error(np.ones(size + 1), want, None, "u") == np.inf


@given(seed=st.integers(0, 2**32), n=st.integers(1, 12))
@settings(deadline=None)
def test_directional_derivatives_are_the_gradients_products(seed, n):
    rng = np.random.default_rng(seed)
    theta, data = {"x": rng.standard_normal(n), "s": np.array(rng.standard_normal())}, {"w": rng.standard_normal(n)}
    loss = lambda theta, data: np.sum(data["w"] * np.sin(theta["x"])) * theta["s"] ** 2  # noqa: E731
    want = {
        "x": data["w"] * np.cos(theta["x"]) * theta["s"] ** 2,
        "s": 2 * theta["s"] * np.sum(data["w"] * np.sin(theta["x"])),
    }
    for h, rel in ((None, 1e-12), (1e-6, 1e-6)):
        found = judge.directional(loss, theta, data, h=h)
        for name, g in want.items():
            exact = judge.directions(name, g.size) @ g.ravel()
            assert found[name] == pytest.approx(
                exact, rel=rel, abs=rel * np.linalg.norm(exact) + 1e-8 * (h is not None)
            )


@given(
    st.recursive(
        st.integers(0, 9).map(np.zeros),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=1), inner),
        max_leaves=8,
    )
)
def test_work_is_counted_however_nested(work):
    def flat(item):
        if isinstance(item, np.ndarray):
            return item.size * 8
        return sum(map(flat, item.values() if isinstance(item, dict) else item))

    assert cell_protocol.held(work) == flat(work) and cell_protocol.held((work, None, 3)) == flat(work)
