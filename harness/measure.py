"""Measure one cell: its judge, then fresh worker processes, then one record."""

import hashlib
import time
from datetime import UTC, datetime

from pydantic import ValidationError

from harness import PROTOCOL, ROOT, processes
from harness.cells import Cell, backend, known_status, modules, size_of
from harness.environments import python
from harness.ledger import AsIs, CellRecord, Floor, invalid
from harness.machine import commit, load, lock_hash, machine_class
from harness.reference import NoReference, Reference, cache_folder, entries, inputs, reference
from harness.source import changed, lines

ENOUGH_S = 30.0


class Crowded(Exception):
    """The cell ran out of memory that a cell beside it holds; alone it may not."""


def measure(
    cell: Cell, *, budget: float, number: int, limit: float, least: int = 3, cpus: list[int] | None = None
) -> CellRecord:
    """The cell's record: `budget` seconds of derivative samples (half of it of the primal) in each of `number` processes,
    which run on `cpus`, one for each thread.

    A cell whose processes take longer than ENOUGH_S has fewer of them. Whatever happens to a worker is a status with a
    sentence in the record.
    """
    began = time.monotonic()
    status, reason = known_status(cell)
    if status:
        return record(cell, began, status=status, reason=reason)
    try:
        judge = reference(cell)
        where = cpus or processes.cpus(cell.threads)
        own = {"limit_s": limit, "cpus": where, "turn": str(cache_folder() / "turn")}
        spec = spec_of(cell, judge, budget, least) | own
    except NoReference as e:
        return record(cell, began, status=e.status if e.status in ("timeout", "oom") else "error", reason=e.reason)
    library = backend(cell.backend)
    environ = library.environ(cell.threads)
    found, measured = [], 0.0
    last: dict = {}
    while len(found) < number and (not found or time.monotonic() - began < ENOUGH_S):
        before = load()
        last = processes.run("measure", spec, environ, cell.threads, limit, python(library))
        measured += last.get("measured_s") or (
            last["wall_s"] if last["status"] in ("timeout", "oom", "crashed") else 0.0
        )
        if last.get("crowded"):
            raise Crowded
        if last["status"] != "ok":
            found = []
            break
        ticks = [t["steal_ticks"] for t in (before, load())]
        steal = ticks[1] - ticks[0] if None not in ticks else None
        found.append(last | {"load1": before["load1"], "steal_ticks": steal})
    rest = {
        "gate": judge.gate,
        "judge": judge.judge,
        "versions": last.get("versions", {}),
        "environ": processes.thread_environ(cell.threads) | environ,
        "cpus": where,
        "measured_s": measured,
    }
    result = {name: last.get(name) for name in ("status", "reason", "loss", "loss_error", "blocks", "error")}
    try:
        return record(cell, began, **rest, **result, processes=found)
    except ValidationError as e:  # a number that an implementation gave is none
        return record(cell, began, **rest, status="error", reason=f"Its result is not a valid record ({invalid(e)}).")


def attempt(cell: Cell, limit: float, **more) -> dict:
    """One call of a cell, judged, even one whose author declares it unsupported: what a test checks him by."""
    spec = spec_of(cell, reference(cell), 0.0, 1) | more
    library = backend(cell.backend)
    return processes.run("measure", spec, library.environ(cell.threads), cell.threads, limit, python(library))


def as_is(cell: Cell, limit: float) -> AsIs:
    """What comes of giving a library a form of the statement unmodified: the cell names both, and no implementation."""
    try:
        result = attempt(cell, limit, as_is=True, cpus=processes.everywhere())
    except NoReference as e:
        result = {"status": "error", "reason": e.reason}
    head, dirty = commit()
    return AsIs.model_validate(
        {name: getattr(cell, name) for name in ("problem", "task", "backend", "form", "strategy", "size")}
        | {name: result.get(name) for name in ("status", "reason", "error")}
        | {
            "key": key(cell),
            "commit": head,
            "dirty": dirty,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def spec_of(cell: Cell, judge: Reference, budget: float, least: int) -> dict:
    """What a worker is told."""
    size = size_of(cell)
    return {
        "problem": cell.problem,
        "task": cell.task,
        "backend": cell.backend,
        "form": cell.form,
        "strategy": cell.strategy,
        "size": size._asdict(),
        "device": cell.device,
        "dtype": cell.dtype,
        "inputs": inputs(cell, size),
        "budget_s": budget,
        "least": least,
        **vars(judge),
    }


def measure_floor(cell: Cell, block: str, budget: float) -> Floor:
    """The triad over arrays as large as the named block of theta."""
    found = processes.run(
        "triad", {"size": entries(cell)[block], "budget_s": budget}, backend("numba").environ(1), 1, 120.0
    )
    if found["status"] != "ok":
        raise NoReference(found["status"], found["reason"])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Floor.model_validate(
        found | {"problem": cell.problem, "task": cell.task, "size": cell.size, "finished": now}
    )


def key(cell: Cell) -> str:
    """Changes whenever the number could: an edited, uncommitted implementation is never served stale numbers."""
    package = ROOT / "problems" / cell.problem
    files = sorted(package.glob("*.py")) if package.is_dir() else [modules("problems")[cell.problem]]
    files += [
        ROOT / "problems/__init__.py",
        ROOT / f"backends/{cell.backend}_backend.py",
        ROOT / "backends/__init__.py",
        ROOT / "backends/numba_math.py",
    ]
    files += sorted((ROOT / "harness").glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    digest.update("\0".join((lock_hash(), machine_class(), cell.address, str(PROTOCOL))).encode())
    return digest.hexdigest()[:16]


def record(cell: Cell, began: float, **rest) -> CellRecord:
    """The record of a cell that began at this monotonic time, with what is common to all."""
    head, dirty = commit()
    return CellRecord.model_validate(
        {
            "key": key(cell),
            "cell": cell.address,
            "problem": cell.problem,
            "task": cell.task,
            "backend": cell.backend,
            "form": cell.form,
            "strategy": cell.strategy,
            "way": cell.way,
            "size": cell.size,
            "size_keys": size_of(cell)._asdict(),
            "device": cell.device,
            "dtype": cell.dtype,
            "threads": cell.threads,
            "env": backend(cell.backend).env,
            "lines": lines(cell) if cell.form else None,
            "changed": changed(cell) if cell.form else None,
            "commit": head,
            "dirty": dirty,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_s": time.monotonic() - began,
            "measured_s": 0.0,
        }
        | rest
    )
