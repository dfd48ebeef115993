"""The ledger: what is written is what is read, a torn last line costs that line only, and nothing else is forgiven."""

import json
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

import jsonschema
import pytest
import test_reports
from conftest import PLAIN, ROOT, is_sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from rich.console import Console

from harness import UserError, ledger, run
from harness.ledger import RECORD, AsIs, CellRecord, Context, End, Floor, Run, Samples, Writer

KINDS = (Context, CellRecord, AsIs, Floor, End)


def values(kind):
    """All that a type allows: so that a new field is tested without a word."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (UnionType, Union):
        return st.one_of(*map(values, args))
    if origin is list:
        return st.lists(values(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if issubclass(kind, BaseModel):
        fields = {f.alias or name: values(f.annotation) for name, f in kind.model_fields.items()}
        return st.fixed_dictionaries(fields).map(kind.model_validate)
    return {
        int: st.integers(-(2**60), 2**60),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=8),
        bool: st.booleans(),
        NoneType: st.none(),
    }[kind]


SCHEMA = jsonschema.Draft202012Validator(json.loads(ledger.schema()))
records = st.one_of(*map(values, KINDS))
contexts, cells = values(Context), values(CellRecord)


def one(kind, **fields):
    """A record with fixed values, and these."""
    simple = {int: 1, float: 0.5, str: "x", bool: True, NoneType: None, list: [], dict: {}}

    def value(kind):
        origin, args = get_origin(kind), get_args(kind)
        if origin is Literal:
            return args[0]
        if origin in (UnionType, Union):
            return value(args[0])
        if origin in (list, dict):
            return simple[origin]
        return one(kind) if issubclass(kind, BaseModel) else simple[kind]

    return kind.model_validate({f.alias or name: value(f.annotation) for name, f in kind.model_fields.items()} | fields)


def written(path, *found, tail=b""):
    path.write_bytes(b"".join(r.model_dump_json(by_alias=True).encode() + b"\n" for r in found) + tail)
    return path


@pytest.fixture
def writer(tmp_path):
    made = Writer("run", tmp_path)
    yield made
    made.file.close()


@given(records)
def test_a_record_reads_back_as_it_was(record):
    line = record.model_dump_json(by_alias=True)
    assert "\n" not in line
    assert RECORD.validate_json(line) == record
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    SCHEMA.validate(strict)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(contexts, st.lists(cells, max_size=4), st.none() | values(End))
def test_a_run_reads_back_as_it_was(tmp_path, context, found, end):
    path = tmp_path / ledger.machine_class() / "run.jsonl"
    path.unlink(missing_ok=True)
    writer = Writer("run", tmp_path)
    for k, record in enumerate([context, *found, *([end] if end else [])], 1):
        writer.append(record)
        assert len(path.read_bytes().split(b"\n")) == k + 1  # on the disk when append returns
    writer.file.close()
    run = Run(path)
    assert (run.context, run.end, run.torn) == (context, end, "")
    assert run.cells == {r.cell: r for r in found}  # the last record of an address counts
    assert ledger.runs(tmp_path) == [path]
    assert [r.path for r in ledger.read([tmp_path])] == [path]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(contexts, st.lists(cells, min_size=1, max_size=3, unique_by=lambda r: r.cell), st.data())
def test_a_line_torn_anywhere_costs_that_line_only(tmp_path, context, found, data):
    """kill -9 or a full disk, at any byte: within a number, within a character, before the newline."""
    path = written(tmp_path / "run.jsonl", context, *found)
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    cut = data.draw(st.integers(last + 1, len(whole) - 1))
    path.write_bytes(whole[:cut])
    run = Run(path)
    complete = cut == len(whole) - 1  # it lacks its newline only
    assert run.cells == {r.cell: r for r in (found if complete else found[:-1])}
    assert bool(run.torn) != complete and (complete or str(path) in is_sentence(run.torn))

    folder = tmp_path / ledger.machine_class()  # going on: no record is lost, and the next starts a line of its own
    folder.mkdir(exist_ok=True)
    path.replace(folder / "run.jsonl")
    writer = Writer("run", tmp_path)
    more = one(CellRecord, cell="another")
    writer.append(more)
    writer.file.close()
    assert Run(writer.path).cells == run.cells | {"another": more}
    assert Run(writer.path).torn == ""


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'{"kind": "cell"}',
        b'{"kind": "what"}',
        b"[]",
        b"nonsense",
        b"\xff\xfe",
        b'{"kind": "end", "finished": "x", "wall_s": NaN, "measured_s": 0}',
        b'{"kind": "end", "finished": "x", "wall_s": Infinity, "measured_s": 0}',
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["inside", "last-with-its-newline"])
def test_any_other_bad_line_is_an_error_that_names_file_and_line(tmp_path, line, last):
    path = written(tmp_path / "run.jsonl", one(Context), one(CellRecord), tail=line + b"\n")
    if not last:
        path.write_bytes(path.read_bytes() + one(End).model_dump_json().encode() + b"\n")
    with pytest.raises(UserError) as raised:
        Run(path)
    said = is_sentence(str(raised.value))
    assert "Line 3 " in said and str(path) in said


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad):
    for field in ("loss", "error", "wall_s", "measured_s", "size_keys"):
        with pytest.raises(ValidationError):
            one(CellRecord, **{field: {"N": bad} if field == "size_keys" else bad})
    with pytest.raises(ValidationError):
        Samples(number=1, wall=[1.0, bad], cpu=[1.0], reference=[1.0])


@pytest.mark.parametrize(
    "field, value", [("status", "fine"), ("threads", "many"), ("blocks", {"u": {}}), ("key", None)]
)
def test_a_record_that_is_not_one_is_refused(field, value):
    with pytest.raises(ValidationError):
        one(CellRecord, **{field: value})


@given(cells, st.dictionaries(st.text(max_size=5).map("later_".__add__), st.integers() | st.text(), max_size=3))
def test_readers_ignore_fields_that_they_do_not_know(record, more):
    line = json.dumps(json.loads(record.model_dump_json()) | more)
    assert RECORD.validate_json(line) == record


def test_what_is_no_ledger_is_one_sentence(tmp_path):
    for name, text in (("empty", ""), ("cells", one(CellRecord).model_dump_json() + "\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as raised:
            Run(tmp_path / name)
        assert str(tmp_path / name) in is_sentence(str(raised.value))
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError) as raised:
            Run(path)
        assert str(path) in is_sentence(str(raised.value))
    with pytest.raises(UserError, match="absent"):
        ledger.read([tmp_path / "absent"])


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError) as raised:
        Writer("run", tmp_path / "file")
    assert str(tmp_path / "file") in is_sentence(str(raised.value))
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_sentence(writer):
    writer.append(one(Context))
    writer.file.close()
    writer.file = open("/dev/full", "w")
    with pytest.raises(UserError) as raised:
        writer.append(one(CellRecord))
    assert str(writer.path) in is_sentence(str(raised.value))
    with pytest.raises(OSError):
        writer.file.close()


def test_the_command_line_says_it_in_one_sentence(module_tree, tmp_path):
    path = written(tmp_path / "run.jsonl", one(Context), tail=b"{\n")
    done = module_tree.adphys("report", "--ledger", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Line 2 " in is_sentence(done.stderr.removesuffix("\n"))


# Resume


def test_resume_measures_what_is_left_and_what_was_edited(tree):
    """Keys that are present are skipped; an edited implementation has another key, so its old number is not served."""
    tree.write("backends/plain_backend.py", PLAIN)
    plain = "problems/brusselator/brusselator_plain.py"
    tree.write(plain, "IMPLEMENTATION = {'imex': {'array': Implementation(f, unsupported={'forward': 'No.'})}}\n")
    code = """
import json, sys
from rich.console import Console
from harness import run
from harness.cells import cell
from harness.measure import measure
if sys.argv[1] == "start":
    writer, context = run.start(["brusselator.imex/plain"], "default", "cpu", seed=1)
    for address in context.plan[: int(sys.argv[2])]:
        writer.append(measure(cell(address), budget=0.01, number=1, limit=9.0))
else:
    writer, context, before = run.resume()
    run.go(writer, context, before, Console(stderr=True))
print(json.dumps([context.plan, [json.loads(line) for line in writer.path.read_text().splitlines()]]))
"""

    def go(*words):
        done = tree.python("-W", "ignore", "-c", code, *words)
        assert done.returncode == 0, done.stderr
        plan, lines = json.loads(done.stdout)
        return plan, [(r["cell"], r["key"]) for r in lines if r["kind"] == "cell"], lines

    plan, first, _ = go("start", "2")
    assert len(plan) == 4 and [c for c, _ in first] == plan[:2]
    plan, found, lines = go("resume")
    assert [c for c, _ in found] == plan and found[:2] == first  # each once
    assert lines[-1]["kind"] == "end"

    tree.ledgers()[0].unlink()
    go("start", "2")
    tree.edit(plain, "No.", "Never.")
    _, found, lines = go("resume")
    assert [c for c, _ in found] == plan[:2] + plan  # the two of before again
    assert not {k for _, k in found[:2]} & {k for _, k in found[2:]}
    said = {
        r["reason"] for r in {r["cell"]: r for r in lines if r["kind"] == "cell"}.values()
    }  # the last of an address
    assert "Never." in said and "No." not in said


def test_a_key_changes_whenever_the_number_could(tree):
    matters = {
        "problems/brusselator/__init__.py": True,
        "problems/brusselator/brusselator_jax.py": True,
        "problems/__init__.py": True,
        "backends/__init__.py": True,
        "backends/jax_backend.py": True,
        "harness/judge.py": True,
        "constraints.txt": True,
        "backends/torch_backend.py": False,
        "problems/other.py": False,
        "README.md": False,
    }
    tree.write("problems/other.py", "TASKS = {}")
    tree.write("README.md", "")
    code = f"""
from harness import ROOT, machine
from harness.cells import cell
from harness.measure import key
for file in {list(matters)}:
    for text in ("", "# edited"):
        with (ROOT / file).open("a") as f:
            f.write(text)
        machine.lock_hash.cache_clear()
        print(*(key(cell("brusselator.rhs/jax/reverse@" + size)) for size in ("tiny", "N=8")))
"""
    done = tree.python("-c", code)
    keys = [line.split() for line in done.stdout.splitlines()]
    assert len(keys) == 2 * len(matters), done.stderr
    assert all(tiny != own for tiny, own in keys)
    changed = [before[0] != after[0] for before, after in zip(keys[::2], keys[1::2], strict=True)]
    assert dict(zip(matters, changed, strict=True)) == matters


# The schema


def test_the_published_schema_is_up_to_date():
    text = (ROOT / "results" / "README.md").read_text()
    assert text == ledger.readme(), "run: python -m harness.ledger > results/README.md"


def test_every_field_of_every_record_is_published():
    text = (ROOT / "results" / "README.md").read_text()
    models = json.loads(ledger.schema())["$defs"]
    for model, definition in models.items():
        section = text.split(f"## {model}\n")[1].split("\n## ")[0]
        for name, field in definition["properties"].items():
            row = next(line for line in section.splitlines() if line.startswith(f"| `{name}` |"))
            assert field.get("description", "").replace("|", "&#124;") in row


def test_what_is_committed_can_be_read():
    """Validated on read: the published runs still are what today's schema says."""
    for path in sorted((ROOT / "results" / "ledger").rglob("*.jsonl")):
        run = Run(path)
        assert run.context and datetime.fromisoformat(run.context.started).astimezone(UTC).year >= 2026


# A machine that others disturb


def recorded(address, kernel, derivative=1e-3, wall_s=1.0):
    """A record whose reference kernel took so long beside each of six samples of the derivative."""
    found = test_reports.cell(address, derivative, wall_s=wall_s)
    found.processes[0].derivative.reference = [kernel] * 6
    return found


def test_a_cell_is_disturbed_where_the_kernel_was_slow_all_the_time():
    calm = [recorded(f"brusselator.rhs/numba/adjoint@N={n}", 4e-4) for n in range(3, 9)]
    slow, once = (recorded(f"brusselator.rhs/{way}@tiny", 8e-4) for way in ("jax/reverse", "torch/reverse"))
    once.processes[0].derivative.reference = [4e-4, *[9e-4] * 5]  # now and then
    found = run.disturbance([*calm, slow, once])
    assert found.pop(slow.cell) == 2 and set(found.values()) == {1}
    assert run.disturbance([slow]) == {}  # nothing to compare with


def test_a_cell_is_disturbed_where_its_quickest_sample_waited_for_the_processor():
    calm = [recorded(f"brusselator.rhs/numba/adjoint@N={n}", 4e-4) for n in range(3, 9)]
    shared = recorded("brusselator.rhs/jax/reverse@tiny", 4e-4)
    samples = shared.processes[0].derivative
    samples.cpu = [wall / 2 for wall in samples.wall]
    assert run.disturbance([*calm, shared])[shared.cell] == 2
    samples.wall[0], samples.cpu[0] = min(samples.wall) * 0.9, min(samples.wall) * 0.9  # one that did not
    assert run.disturbance([*calm, shared])[shared.cell] == 1
    shared.threads = 2  # whose CPU seconds add up
    samples.cpu = [2 * wall for wall in samples.wall]
    assert run.disturbance([*calm, shared])[shared.cell] == 1


@pytest.mark.parametrize(("kernel", "kept"), [(4e-4, "second"), (9e-4, "first")])
def test_a_disturbed_cell_is_measured_once_more_and_the_calmer_record_counts(monkeypatch, kernel, kept):
    plan = [f"brusselator.rhs/numba/adjoint@N={n}" for n in range(3, 10)]
    first = {address: recorded(address, 8e-4 if "N=9" in address else 4e-4) for address in plan}
    dear = first["brusselator.rhs/numba/adjoint@N=3"] = recorded(plan[0], 8e-4, wall_s=run.AGAIN_S + 1)
    second = recorded(plan[-1], kernel, derivative=2e-3)  # slower all the same: that is not what is asked
    asked, written = [], []

    def measured(cell, context, records, cpus):
        asked.append(cell.address)
        return second if asked.count(cell.address) == 2 else first[cell.address]

    monkeypatch.setattr(run, "_measure", measured)
    monkeypatch.setattr(run, "lanes", lambda: [[0]])
    for name in ("_references", "_floors", "_as_is"):
        monkeypatch.setattr(run, name, lambda *a: None)
    context = ledger.Context.model_construct(plan=plan, preset="default")
    records = run.go(type("Nowhere", (), {"append": written.append}), context, None, Console(stderr=True))
    assert asked == [*plan, plan[-1]] and dear in records
    assert [r.cell for r in written[:-1]] == plan + ([plan[-1]] if kept == "second" else [])
    assert records[-1] is (second if kept == "second" else first[plan[-1]])


def test_what_timed_out_beside_another_cell_is_tried_again_alone(monkeypatch):
    plan = [f"brusselator.rhs/numba/{strategy}@small" for strategy in ("adjoint", "difference", "duals")]
    asked = []

    def measured(cell, context, records, cpus):
        asked.append((cell.address, cpus))
        found = recorded(cell.address, 4e-4, wall_s=61.0)
        return found.model_copy(update={"status": "timeout"} if cpus and cell.strategy == "duals" else {})

    monkeypatch.setattr(run, "_measure", measured)
    monkeypatch.setattr(run, "lanes", lambda: [[0], [1]])
    for name in ("_references", "_floors", "_as_is"):
        monkeypatch.setattr(run, name, lambda *a: None)
    context = ledger.Context.model_construct(plan=plan, preset="quick", limit_s=60.0)
    records = run.go(type("Nowhere", (), {"append": lambda self, line: None})(), context, None, Console(stderr=True))
    assert len(asked) == 4 and asked[-1] == (plan[-1], None)
    assert {r.cell: r.status for r in records} == dict.fromkeys(plan, "ok")
