"""The ledger as asv results, without measuring again. The one module that uses asv's Python API.

That API is undocumented: asv is pinned in the lock, and tests/test_asv.py goes the whole way round (export, then asv's
own show, compare and publish). asv is the historian here, not the gate, so each process gives one number, its minimum:
asv's value is then the median over processes of minima, the least noisy that there is in seconds. `derivative_in_kernels`
is the minimum over that of the reference kernel beside it, which halves the noise once more.

Names and parameters hold no exact version, kernel or clock rate, because asv starts a new graph wherever one changes;
the ledger has them all. A tree that differed from its commit is not exported: its numbers belong to no commit.
"""

import math
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.machine import Machine
from asv.repo import get_repo
from asv.results import Results
from asv.runner import BenchmarkResult
from asv.util import UserError as AsvError

from harness import ROOT, UserError
from harness.asv_shared import SKIPPED, version
from harness.cells import SIZES
from harness.ledger import CellRecord, Process, Run
from harness.statistics import history_point

ENVIRONMENT = "ledger"  # in the place of asv's environment name; results of `asv run` have another
PYTHON = "3.11"  # fixed, see above


class Metric(NamedTuple):
    name: str
    type: str
    unit: str
    sentence: str
    number: Callable[[Process], float | None]  # of one process


def _memory(process: Process) -> float | None:
    return None if process.memory.peak is None else process.memory.peak + process.memory.work


METRICS = (
    Metric(
        "derivative",
        "time",
        "seconds",
        "One call of the derivative, loss and gradient: the minimum in each process.",
        lambda p: min(p.derivative.wall),
    ),
    Metric(
        "primal",
        "time",
        "seconds",
        "One call of the primal, the loss alone: the minimum in each process.",
        lambda p: min(p.primal.wall),
    ),
    Metric(
        "first_call",
        "time",
        "seconds",
        "The first call of the derivative: prepare, trace, compile, run.",
        lambda p: p.first_call_s,
    ),
    Metric(
        "peak_memory",
        "peakmemory",
        "bytes",
        "Peak of one call of the derivative, and what prepare allocated.",
        _memory,
    ),
    Metric(
        "derivative_in_kernels",
        "track",
        "kernels",
        "derivative over the minimum of the reference kernel timed beside it: the least noisy history.",
        lambda p: float(f"{history_point([p]):.6g}"),  # asv shows every digit of a number without a unit
    ),
)


class Measured(NamedTuple):
    """A cell at a commit, and the version under which asv may compare it."""

    record: CellRecord
    version: str


def export(runs: list[Run], root: Path = ROOT) -> Path:
    """Write benchmarks.json, machine.json and a file a commit into asv's results folder; return the folder.

    What an earlier export wrote there is replaced. Of several runs at one commit the later wins, cell by cell. What is
    left out is said on stderr.
    """
    conf = _config(root)
    points, dates, left_out = _points(runs, conf)
    if not points:
        raise UserError(" ".join(left_out) or "These ledgers have no cells; run `adphys run` first.")
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    definitions = _definitions(points, dates)
    machines = {run.context.machine_class: run.context.machine for run in runs}
    folder = Path(conf.results_dir)
    try:
        for old in folder.glob(f"*/*-{ENVIRONMENT}.json"):
            old.unlink()
        Benchmarks(conf, [*_of_asv_run(conf), *definitions]).save()
        for (name, commit), cells in points.items():
            machine = _save_machine(folder, name, machines[name])
            results = Results(machine | {"python": PYTHON}, {}, commit, dates[commit], PYTHON, ENVIRONMENT, {})
            for definition in definitions:
                _add(results, definition, cells)
            results.save(conf.results_dir)
    except OSError as e:
        raise UserError(
            f"The asv results in {folder} cannot be written: {e.strerror}; make the folder writable."
        ) from None
    return folder


def _config(root: Path) -> Any:
    """asv's Config, with whole paths. Attributes of a Config are set at run time, hence Any."""
    try:
        conf: Any = Config.load(str(root / "asv.conf.json"))
    except AsvError as e:
        raise UserError(f"asv's configuration cannot be read: {e}") from None
    conf.repo = str(root)
    conf.results_dir = str(root / conf.results_dir)
    return conf


def _points(runs: list[Run], conf: Any) -> tuple[dict[tuple[str, str], dict[str, Measured]], dict[str, int], list[str]]:
    """(machine class, commit) -> address -> cell; commit -> its date as asv writes it; what is left out, in sentences."""
    root = Path(conf.repo)

    @cache
    def known(commit: str) -> bool:
        return _git(root, "cat-file", "-e", f"{commit}^{{commit}}") is not None

    @cache
    def statement(commit: str, problem: str) -> str | None:
        package = _git(root, "show", f"{commit}:problems/{problem}/__init__.py")
        return _git(root, "show", f"{commit}:problems/{problem}.py") if package is None else package

    found: dict[tuple[str, str], dict[str, Measured]] = defaultdict(dict)
    left_out = Counter()
    records = [(record, run) for run in runs for record in run.cells.values()]
    for record, run in sorted(records, key=lambda pair: pair[0].finished):
        if record.commit is None:
            why = "they were measured outside a git repository"
        elif record.dirty:
            why = "the tree differed from its commit; commit the changes, then run again"
        elif not known(record.commit):
            why = f"this repository does not have their commit {record.commit[:8]}; fetch the full history"
        elif (text := statement(record.commit, record.problem)) is None:
            why = f"their commit {record.commit[:8]} does not have the problem {record.problem}; commit it, then run again"
        else:
            of = version(run.context.protocol, text, record.task)
            found[run.context.machine_class, record.commit][record.cell] = Measured(record, of)
            continue
        left_out[run.path.name, why] += 1
    said = [f"Cells of {name} not exported to asv: {n}, because {why}." for (name, why), n in left_out.items()]
    repo: Any = get_repo(conf) if found else None
    return found, {commit: repo.get_date(commit) for _, commit in found}, said


def _definitions(points: dict[tuple[str, str], dict[str, Measured]], dates: dict[str, int]) -> list[dict]:
    """asv's description of every benchmark: parameters over all commits, version of the newest."""
    by_task = defaultdict(list)
    for _, cells in sorted(points.items(), key=lambda item: dates[item[0][1]]):
        for cell in cells.values():
            by_task[_task(cell.record)].append(cell)
    definitions = []
    for task, cells in sorted(by_task.items()):
        ways = sorted({c.record.way for c in cells})
        sizes = sorted(
            {_size(c.record) for c in cells}, key=lambda s: (SIZES.index(s) if s in SIZES else len(SIZES), s)
        )
        for metric in METRICS:
            definitions.append(
                {
                    "name": f"{task}.{metric.name}",
                    "type": metric.type,
                    "unit": metric.unit,
                    "code": metric.sentence,
                    "params": [[repr(way) for way in ways], [repr(size) for size in sizes]],
                    "param_names": ["way", "size"],
                    "version": cells[-1].version,
                }
            )
    return definitions


def _add(results: Results, definition: dict, cells: dict[str, Measured]) -> None:
    """One benchmark at one commit, under the version that it had there."""
    task, _, name = definition["name"].rpartition(".")
    metric = next(m for m in METRICS if m.name == name)
    here = {(repr(c.record.way), repr(_size(c.record))): c for c in cells.values() if _task(c.record) == task}
    if not here:
        return
    values, samples = [], []
    ways, sizes = definition["params"]
    for way in ways:
        for size in sizes:
            cell = here.get((way, size))
            value, numbers = _value(cell.record, metric) if cell else (math.nan, None)
            values.append(value)
            samples.append(numbers)
    number = [s and 1 for s in samples]
    last = max(here.values(), key=lambda c: c.record.finished)
    results.add_result(
        definition | {"version": last.version},
        BenchmarkResult(values, samples, number, errcode=0, stderr="", profile=None),
        started_at=datetime.fromisoformat(last.record.finished),
        record_samples=True,
    )


def _value(record: CellRecord, metric: Metric) -> tuple[float | None, list[float] | None]:
    """asv's value and samples: NaN is skipped, None is failed, and only an ok cell has samples."""
    if record.status in SKIPPED:
        return math.nan, None
    if record.status != "ok":
        return None, None
    numbers = [n for p in record.processes if (n := metric.number(p)) is not None]
    if len(numbers) == 6:  # against 6, asv's rank test has p = 0.0022 at best and asks for 0.002; 5 it judges otherwise
        numbers.pop()
    return (1.0, numbers) if numbers else (math.nan, None)  # asv takes the value from the samples


def _save_machine(folder: Path, name: str, machine: dict) -> dict[str, str]:
    """machine.json of a class: only what makes the class, so that it never changes."""
    fixed = {
        "machine": name,
        "os": "Linux",
        "arch": str(machine.get("arch", "")),
        "cpu": name,
        "num_cpu": str(machine.get("cores", "")),
        "ram": f"{machine.get('ram_gib', '')} GiB",
    }
    described = Machine()
    vars(described).update(fixed)
    described.save(str(folder))
    return fixed


def _of_asv_run(conf: Any) -> list[dict]:
    """Benchmarks that `asv run` described in the same folder; their functions are all named track_."""
    try:
        described = Benchmarks.load(conf)
    except AsvError:  # there are none, or another asv wrote them
        return []
    return [b for name, b in described.items() if name.rpartition(".")[2].startswith("track_")]


def _task(record: CellRecord) -> str:
    return f"{record.problem}.{record.task}"


def _size(record: CellRecord) -> str:
    """With the device, dtype or threads where they are not the usual ones."""
    return record.cell.partition("@")[2]


def _git(root: Path, *words: str) -> str | None:
    """What git says, None where it fails."""
    try:
        ended = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    except OSError as e:
        raise UserError(
            f"git cannot be run ({e.strerror}); asv's results are kept by commit, so install git."
        ) from None
    return ended.stdout if ended.returncode == 0 else None
