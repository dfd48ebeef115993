"""The command line, in a process of its own: what it prints, what it exits with, what SIGKILL costs."""

import contextlib
import json
import os
import re
import shlex
import signal
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from conftest import PLAIN, is_refusal, is_sentence

from harness import processes, run
from harness.cells import cell
from harness.ledger import CellRecord, Context, End, Run
from problems import brusselator, gold

KEYS = ["cell", "status", "reason", "loss", "blocks", "error", "first_call_s", "median_s", "primal_median_s"]
COMMANDS = ("list", "run", "gradient", "show", "report", "export-asv")

BOWL = """
from typing import NamedTuple
import numpy as np
from problems import Task, gold

class Size(NamedTuple):
    N: int

def inputs(size):
    return {"x": 1 + gold(size.N)}, {"w": gold(size.N, 3)}

def bowl(theta, data, size):
    return np.sum(data["w"] * theta["x"] ** 2) / 2

TASKS = {name: Task(Size, {"tiny": Size(3), "small": Size(5), "large": Size(7)}, inputs, {"array": bowl}, 1e-10, 1e-5)
         for name in ("a", "b", "c", "d", "e")}
"""


def test_without_arguments_it_says_what_it_is(module_tree):
    done = module_tree.adphys()
    assert (done.returncode, done.stderr) == (0, "")
    assert 6 <= len(done.stdout.splitlines()) <= 14
    tries = re.findall(r"^  adphys (.+?)   ", done.stdout, re.M)
    assert len(tries) == 3
    for words in [shlex.split(part) for line in tries for part in line.split("&& adphys")]:
        assert words[0] in COMMANDS
    assert module_tree.adphys(*shlex.split(tries[0])).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(module_tree, command):
    done = module_tree.adphys(command, "--help")
    assert done.returncode == 0 and command in done.stdout


def test_list_as_json(module_tree):
    done = module_tree.adphys("list", "brusselator.rhs", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and len(found) > 20
    assert all(list(f) == ["cell", "status", "reason"] for f in found)
    assert {"cell": "brusselator.rhs/jax/reverse@small", "status": None, "reason": None} in found
    assert all((f["status"] is None) == (f["reason"] is None) for f in found)
    text = module_tree.adphys("list", "brusselator.rhs").stdout
    assert all(f["cell"] in text for f in found)


def test_gradient_as_json_is_one_object_to_full_precision(module_tree):
    done = module_tree.adphys("gradient", "brusselator.rhs/numpy/complex_step@N=5,alpha=0.7", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    said = json.loads(done.stdout)
    assert list(said) == KEYS and said["cell"] == "brusselator.rhs/numpy/complex_step@N=5,alpha=0.7"
    assert (said["status"], said["reason"]) == ("ok", None)

    size = brusselator.Rhs(5, alpha=0.7)
    theta, data = brusselator.rhs_inputs(size)
    assert said["loss"] == float(brusselator.rhs(theta, data, size))
    assert list(said["blocks"]) == list(theta)
    for name, block in said["blocks"].items():
        assert list(block) == ["size", "norm", "dot_gold5", "error"]
        g = np.zeros(theta[name].shape)
        for k in np.ndindex(g.shape):
            z = theta[name].astype(complex)
            z[k] += 1e-20j
            g[k] = np.imag(brusselator.rhs(theta | {name: z}, data, size)) / 1e-20
        assert block["size"] == g.size
        assert block["norm"] == pytest.approx(np.linalg.norm(g), rel=1e-14)
        assert block["dot_gold5"] == pytest.approx(g.ravel() @ gold(g.size, 5), rel=1e-13)
    numbers = []
    json.loads(done.stdout, parse_float=numbers.append)
    assert all(repr(float(text)) == text for text in numbers)
    assert sum(len(re.sub(r"e.*|\D", "", text)) >= 15 for text in numbers) >= 6


def test_gradient_for_a_reader(module_tree):
    done = module_tree.adphys("gradient", "brusselator.rhs/numpy/difference@tiny")
    assert done.returncode == 0
    for word in ("brusselator.rhs/numpy/difference@tiny: ok", "loss ", "alpha", "dot_gold5", "first call", "primal"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "words, code",
    [
        (["list", "brusselator.rhs/numpy@tiny"], 0),
        (["gradient", "brusselator.rhs/plain/forward@tiny"], 1),  # missing
        (["gradient", "brusselator.rhs/plain/adjoint@tiny"], 1),
        (["run", "brusselator.imex/plain/adjoint@tiny"], 0),  # it is declared, and a run holds it
        (["gradient", "nothing.at/all@tiny"], 2),
        (["gradient", "brusselator.rhs/numpy/difference@N=0"], 2),
        (["gradient", "brusselator.rhs/numpy/difference"], 2),
        (["gradient", "brusselator.rhs/numpy/difference@tiny,device=gpu"], 2),
        (["list", "nothing"], 2),
        (["run", "nothing"], 2),
        (["run", "--preset", "huge"], 2),
        (["run", "brusselator.rhs@small", "--device", "tpu"], 2),
        (["run", "--resume", "--preset", "quick"], 2),
        (["show", "nothing", "numpy"], 2),
        (["show", "brusselator.rhs", "nothing"], 2),
        (["show", "brusselator.rhs", "plain"], 2),
        (["report", "--ledger", "no/such/ledger"], 2),
        (["export-asv", "--ledger", "no/such/ledger"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_exit_codes(tree, words, code):
    tree.write("backends/plain_backend.py", PLAIN)
    done = tree.adphys(*words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code == 2:
        is_refusal(done)
        assert tree.ledgers() == []


@pytest.mark.parametrize("words", [["report"], ["run", "--resume"]], ids=" ".join)
def test_nothing_to_go_on_with_is_one_sentence(tree, words):
    assert "adphys run" in is_refusal(tree.adphys(*words))


def test_a_results_folder_that_cannot_be_written_is_one_sentence(tree):
    tree.write("results/ledger", "a file where the folder should be")
    said = is_refusal(tree.adphys("run", "brusselator.rhs/numpy@tiny"))
    assert "results/ledger" in said and "cannot be written" in said
    assert (tree.folder / "results" / "ledger").read_text() == "a file where the folder should be"


def test_a_cache_folder_that_cannot_be_written_is_one_sentence(tree, tmp_path):
    (tmp_path / "file").write_text("")
    tree.cache = tmp_path / "file"
    assert "ADPHYS_CACHE" in is_refusal(tree.adphys("gradient", "brusselator.rhs/numpy/difference@tiny", "--json"))


def test_show_puts_both_side_by_side(tree):
    tree.write("backends/plain_backend.py", PLAIN)
    tree.write("backends/other_backend.py", PLAIN)
    body = "\n".join(f"    step_{k} = {k}" for k in range(5))
    for name in ("plain", "other"):
        code = f"def helper():\n    return '{name}_help'\n\ndef unused():\n    pass\n\n"
        code += f"def {name}_rhs():\n{body}\n    return helper()\n\n"
        code += f"IMPLEMENTATION = {{'rhs': {{'array': Implementation({name}_rhs)}}}}\n"
        tree.write(f"problems/brusselator/brusselator_{name}.py", code)
    lines = tree.adphys("show", "brusselator.rhs", "plain/forward", "other/forward").stdout.splitlines()
    assert any(
        "brusselator.rhs/plain/forward, 9 lines" in line and "brusselator.rhs/other/forward, 9 lines" in line
        for line in lines
    )
    for part in ("def {}_rhs", "'{}_help'"):
        assert any(part.format("plain") in line and part.format("other") in line for line in lines)
    assert sum("step_3 = 3" in line for line in lines) == 1 and not any("unused" in line for line in lines)
    real = tree.adphys("show", "brusselator.rhs", "jax", "numba/adjoint").stdout
    assert "jnp." in real and "rhs_adjoint" in real


# Runs


@pytest.fixture
def bowls(tree):
    """Five tasks of which each cell takes half a second."""
    tree.write("problems/bowl.py", BOWL)
    run = tree.folder / "harness" / "run.py"
    text, edits = re.subn(r'("quick": Preset\(.*?budget=)[\d.]+', r"\g<1>0.02", run.read_text())
    assert edits == 1
    run.write_text(text)
    return tree


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.skipif(len(processes.lanes(range(os.cpu_count() or 1))) < 2, reason="one core")
def test_cells_are_measured_in_two_lanes_where_there_are_two_cores(bowls):
    """Each once, each on one processor of its own, and the last line counts both lanes."""
    everywhere = lambda: os.sched_setaffinity(0, range(os.cpu_count() or 1))  # noqa: E731 - more than a test has
    words = "-m", "harness", "run", "bowl*/numpy@tiny", "--preset", "quick"
    with bowls.start(*words, preexec_fn=everywhere) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    (path,) = bowls.ledgers()
    found = [r for r in lines(path) if r["kind"] == "cell"]
    assert len(found) == len({r["cell"] for r in found}) == 10
    assert sorted({tuple(r["cpus"]) for r in found}) == sorted(map(tuple, processes.lanes(range(os.cpu_count() or 1))))
    assert "inside first and measured calls in each of 2 lanes." in said


def test_a_run_is_one_file_from_context_to_end(bowls):
    words = ["run", "bowl.a", "bowl.b/numpy/difference@N=4", "--preset", "quick"]
    done = bowls.adphys(*words)
    assert done.returncode == 0, done.stderr
    (path,) = bowls.ledgers()
    assert done.stdout.strip() == f"ledger: {path.relative_to(bowls.folder)}"
    assert "of it inside first and measured calls" in done.stderr
    found = lines(path)
    assert [r["kind"] for r in found] == ["context", "cell", "cell", "end"] or {r["kind"] for r in found} == {
        "context",
        "cell",
        "end",
    }
    run = Run(path)
    assert isinstance(run.context, Context) and isinstance(run.end, End)
    assert list(run.cells) == run.context.plan  # each cell once, in the order that the seed gave
    ok = [r for r in run.cells.values() if r.backend == "numpy"]
    assert {r.cell for r in ok} == {"bowl.a/numpy/complex_step@small", "bowl.b/numpy/difference@N=4"}
    assert all(isinstance(r, CellRecord) and r.status == "ok" and len(r.processes) == 1 for r in ok)
    assert all(r.status == "missing" and not r.processes for r in run.cells.values() if r.backend != "numpy")
    assert run.context.patterns == words[1:3] and run.context.lock_hash and run.context.versions["numpy"]
    assert sum(r.measured_s for r in ok) == pytest.approx(run.end.measured_s) and run.end.measured_s <= run.end.wall_s


def test_the_order_is_random_and_seeded(bowls):
    code = """
from pathlib import Path
from harness import run
for seed in (1, 1, 2):
    run.Writer = lambda run, new: type("Nowhere", (), {"path": Path(run), "append": print_plan})()
    run.start(["bowl@tiny"], "quick", "cpu", seed=seed)
"""
    code = "def print_plan(self, context):\n    print(context.seed, *context.plan)\n" + code
    one, again, two = bowls.python("-c", code).stdout.splitlines()
    assert one == again and one.split()[1:] != two.split()[1:] and sorted(one.split()[1:]) == sorted(two.split()[1:])
    assert one.split()[1:] != sorted(one.split()[1:])


def test_a_run_that_was_killed_goes_on_and_measures_no_finished_cell_twice(bowls):
    words = ["-m", "harness", "run", "bowl*/numpy@tiny", "--preset", "quick"]
    process = bowls.start(*words, start_new_session=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.read_bytes().count(b'"kind":"cell"') >= 2 for path in bowls.ledgers()):
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said

    (path,) = bowls.ledgers()
    with path.open("ab") as f:
        f.write(b'{"kind": "cell", "key": "to')  # as if it had been killed while it wrote
    killed = Run(path)
    assert killed.context and killed.end is None and str(path) in is_sentence(killed.torn)
    assert 2 <= len(killed.cells) < len(killed.context.plan) == 10
    before = path.read_bytes().splitlines()[: 1 + len(killed.cells)]

    done = bowls.adphys("run", "--resume")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "torn" in said and f"{len(killed.cells)} cells are in the ledger; {10 - len(killed.cells)} are left." in said
    assert bowls.ledgers() == [path]
    assert path.read_bytes().splitlines()[: len(before)] == before  # what was finished is as it was
    found = lines(path)
    assert [r["kind"] for r in found] == ["context", *["cell"] * 10, "end"]
    assert sorted(r["cell"] for r in found[1:-1]) == sorted(killed.context.plan)  # each once, none left out
    assert {r["status"] for r in found[1:-1]} == {"ok"}
    assert [r["cell"] for r in found[1:-1]] == killed.context.plan

    said = is_refusal(bowls.adphys("run", "--resume"))
    assert "no unfinished run" in said and lines(path) == found


STARTED = """
def bowl(theta, data, size):
    if np.iscomplexobj(theta["x"]):  # the reference
        with open({mark!r}, "a") as f:
            f.write("x")
        time.sleep(0.2)
"""


def test_ctrl_c_among_the_references_ends_the_run_at_once(bowls, tmp_path):
    """No further worker starts, none is left behind, and the sentence says how to go on."""
    mark = tmp_path / "mark"
    bowls.edit("problems/bowl.py", "def bowl(theta, data, size):\n", STARTED.format(mark=str(mark)))
    bowls.edit("problems/bowl.py", "import numpy as np", "import time\nimport numpy as np")
    words = "-m", "harness", "run", "bowl*/numpy@tiny", "--preset", "quick"
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731 - a shell's background job does not
    process = bowls.start(*words, start_new_session=True, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGINT)
    out, said = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, ""), said
    assert "adphys run --resume" in is_sentence(said.splitlines()[-1])
    assert "Traceback" not in said and workers and not any(w.is_running() for w in workers)
    size = mark.stat().st_size
    time.sleep(1.0)
    assert mark.stat().st_size == size

    done = bowls.adphys("run", "--resume")
    assert done.returncode == 0, done.stderr
    (path,) = bowls.ledgers()
    assert [r["kind"] for r in lines(path)] == ["context", *["cell"] * 10, "end"]


def test_a_size_larger_than_the_memory_ends_its_cell_and_not_the_run(bowls):
    bowls.edit(
        "harness/processes.py", "MEMORY_SHARE = 0.85", f"MEMORY_SHARE = {500 * 2**20 / psutil.virtual_memory().total}"
    )
    done = bowls.adphys("run", "bowl.a/numpy@N=100000000", "bowl.a/numpy@tiny", "--preset", "quick")
    assert done.returncode == 1, done.stderr
    run = Run(bowls.ledgers()[0])
    assert run.end and {r.size: r.status for r in run.cells.values()} == {"N=100000000": "oom", "tiny": "ok"}
    assert all("inputs" in is_sentence(r.reason) for r in run.cells.values() if r.status == "oom")


def test_two_runs_of_one_second_have_a_file_each(bowls):
    code = """
from harness import run
run.datetime = type("Frozen", (), {"now": lambda zone, now=run.datetime.now(run.UTC): now})
for patterns in (["bowl.a@tiny"], ["bowl.b@tiny"]):
    writer, context = run.start(patterns, "quick", "cpu")
    print(context.run)
print(run.resume()[1].run)
"""
    done = bowls.python("-c", code)
    one, two, newest = done.stdout.splitlines()
    assert one != two == newest, done.stderr
    assert {(path.stem, Run(path).context.run) for path in bowls.ledgers()} == {(one, one), (two, two)}


def test_a_run_killed_before_its_context_record_is_passed_over(bowls):
    assert bowls.adphys("run", "bowl.a/numpy@tiny", "--preset", "quick").returncode == 0
    (path,) = bowls.ledgers()
    for name, text in (("29991231T235959Z-run", ""), ("29991231T235959Z-torn", '{"kind": "conte')):
        (path.parent / f"{name}.jsonl").write_text(text)
    for words in (["report"], ["report", "--ledger", "results/ledger"]):
        done = bowls.adphys(*words)
        assert done.returncode == 0, done.stderr
    assert "no unfinished run" in is_refusal(bowls.adphys("run", "--resume"))


def test_a_run_of_every_way_gives_the_statements_as_they_are(tree):
    done = tree.adphys("run", "brusselator.rhs/autograd/tape@tiny", "--preset", "default")
    assert done.returncode == 0, done.stderr
    [path] = tree.ledgers()
    kinds = [json.loads(row) for row in path.read_text().splitlines()]
    tried = {row["form"]: row["status"] for row in kinds if row["kind"] == "as_is"}
    assert tried == {"array": "ok", "inplace": "error", "loops": "error"}
    # killed before its end record: what is there is not tried again
    path.write_text("".join(json.dumps(row) + "\n" for row in kinds if row["kind"] != "end"))
    assert tree.adphys("run", "--resume").returncode == 0
    assert path.read_text().count('"kind":"as_is"') + path.read_text().count('"kind": "as_is"') == 3


def test_a_run_with_a_wrong_cell_exits_with_1_and_holds_it(bowls):
    bowls.edit(
        "backends/numpy_backend.py",
        "(plus - loss(step, data)) / (up - down)",
        "(plus - loss(step, data)) / (up + down)",
    )
    done = bowls.adphys("run", "bowl.a/numpy@tiny", "--preset", "quick")
    assert done.returncode == 1, done.stderr
    found = {r.cell: r for r in Run(bowls.ledgers()[0]).cells.values()}
    assert found["bowl.a/numpy/complex_step@tiny"].status == "ok"
    assert (
        found["bowl.a/numpy/difference@tiny"].status == "wrong"
        and found["bowl.a/numpy/difference@tiny"].processes == []
    )
    assert "bowl.a/numpy/difference@tiny" in done.stderr and "wrong" in done.stderr


@pytest.mark.parametrize(
    "growth, times, status", [(1, 1, ""), (10, 2, ""), (25, 1, "25 times as long"), (1, 40, "40 times the entries")]
)
def test_what_runs_once_for_each_entry_is_predicted_by_entries_and_primals(monkeypatch, growth, times, status):
    """And comes last among its size, when the primals are known."""

    def measured(seconds, entries):
        time = SimpleNamespace(minimum=seconds, median=seconds)
        return SimpleNamespace(
            status="ok", blocks={"u": SimpleNamespace(size=entries)}, s=SimpleNamespace(primal=time, derivative=time)
        )

    ways = [
        cell(f"brusselator.rhs/jax/{strategy}@{size}")
        for size in ("small", "large")
        for strategy in ("forward", "reverse")
    ]
    assert [c.strategy for c in sorted(ways, key=run._late)] == ["reverse", "forward"] * 2
    large = ways[2]
    records = {
        ways[0].address: measured(2.0, 10),
        ways[1].address: measured(0.1, 10),
        ways[3].address: measured(0.1 * growth, 10),
    }
    monkeypatch.setattr(run, "summary", lambda record: record.s)
    monkeypatch.setattr(run, "entries", lambda c: {"u": 10 * times})
    said = run._will_break(large, SimpleNamespace(limit_s=45.0), records)
    assert status in is_sentence(said) if status else said == ""
