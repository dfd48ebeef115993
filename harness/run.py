"""A run: the cells of a preset in random order into one ledger file; and going on with one that was killed."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from queue import SimpleQueue

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from harness import PROTOCOL, UserError
from harness.cells import (
    APPROXIMATE_OR_SLOW,
    SIZES,
    Cell,
    backend,
    backends,
    cells,
    form_of,
    known_status,
    main_strategy,
    tasks,
)
from harness.ledger import DECLARED, CellRecord, Context, End, Run, Writer, runs
from harness.machine import commit, lock_hash, machine, machine_class
from harness.measure import Crowded, as_is, key, measure, measure_floor, record
from harness.processes import STOP, everywhere, lanes
from harness.reference import NoReference, entries, reference
from harness.statistics import summary


@dataclass(frozen=True)
class Preset:
    sizes: tuple[str, ...]
    ways: str  # "main": natural form, main strategy; "each": every form, and of the natural one every strategy; "all"
    sweep: bool
    lanes: bool  # a small cell is prepared and compiled beside another that takes its samples
    budget: float
    processes: int
    limit: float  # seconds of the first call


PRESETS = {
    "quick": Preset(("small",), "main", sweep=False, lanes=True, budget=0.2, processes=1, limit=20.0),
    "default": Preset(("small", "large"), "each", sweep=False, lanes=True, budget=0.5, processes=1, limit=60.0),
    "full": Preset(SIZES, "all", sweep=True, lanes=False, budget=2.0, processes=3, limit=600.0),
}

BESIDE = ("tiny", "small")  # a large cell shares the memory's bandwidth: one took twice its time beside a compiler
DISTURBED = 1.25  # times the calm kernel; idle, the cells of a run differ by 0.1
FOR_EACH_ENTRY = ("forward", "duals", "sensitivity")
AGAIN_S = 30.0  # a cell that took longer is not measured again


def plan(patterns: list[str], preset: str, device: str) -> list[Cell]:
    """The cells of a run, each once, in the order of their addresses."""
    p, found = PRESETS[preset], {}
    for pattern in patterns or ["*"]:
        if "@" in pattern:
            asked = [*cells(pattern)]
        else:
            asked = [c for c in cells(pattern) if c.size in p.sizes and _taken(c, p.ways)]
            if p.sweep:
                asked += _sweep(pattern)
            if p.sweep and device == "cpu":
                asked += _all_cores(asked)
        if device != "cpu":
            asked = [replace(c, device=device) for c in asked]
        found |= {c.address: c for c in asked}
    if not found:
        raise UserError(
            f"The preset {preset} has no cell that matches {' '.join(patterns)}; add a size, as in {patterns[0]}@tiny."
        )
    return [found[address] for address in sorted(found)]


def _late(cell: Cell) -> tuple[int, bool]:
    """A small size tells of a large one, and a primal of what runs it for every entry."""
    return SIZES.index(cell.size) if cell.size in SIZES else len(SIZES), cell.strategy in FOR_EACH_ENTRY


def _may_be_beside(cell: Cell) -> bool:
    return cell.size in BESIDE and cell.threads == 1 and cell.device == "cpu"


def _main(cell: Cell) -> bool:
    return _taken(cell, "main")


def _taken(cell: Cell, ways: str) -> bool:
    main = cell.strategy == main_strategy(cell)
    given = cell.strategy in form_of(cell).strategies
    return {"main": cell.natural and main, "each": cell.natural or main or given, "all": True}[ways]


def _sweep(pattern: str) -> Iterable[Cell]:
    """The sizes that a task names for its figures of time against size and against error."""
    for cell in cells(pattern + "@small"):
        if cell.strategy not in APPROXIMATE_OR_SLOW:
            task = tasks(cell.problem)[cell.task]
            implicit = cell.strategy == "implicit" and task.converged  # goes to the root whatever the tolerance
            for size in (*task.sweep, *(() if implicit else task.tolerances)):
                yield replace(cell, size=",".join(f"{k}={v}" for k, v in size.items()))


def _all_cores(asked: list[Cell]) -> list[Cell]:
    """The main ways of the libraries that have threads, at large on every processor."""
    main = [c for c in asked if c.size == "large" and _main(c) and backend(c.backend).all_cores]
    return [replace(c, threads=cores) for c in main if (cores := len(everywhere())) > 1]


def start(patterns: list[str], preset: str, device: str, seed: int | None = None) -> tuple[Writer, Context]:
    """A new run: its file, with the context record written."""
    now, p = datetime.now(UTC), PRESETS[preset]
    order = plan(patterns, preset, device)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    random.Random(seed).shuffle(order)
    order.sort(key=_late)
    head, dirty = commit()
    writer = Writer(f"{now:%Y%m%dT%H%M%SZ}-{'run' if patterns else preset}", new=True)
    context = Context.model_validate(
        {
            "schema": 1,
            "run": writer.path.stem,
            "preset": preset,
            "patterns": patterns,
            "protocol": PROTOCOL,
            "seed": seed,
            "plan": [cell.address for cell in order],
            "budget_s": p.budget,
            "processes": p.processes,
            "limit_s": p.limit,
            "lanes": len(lanes()) if p.lanes else 1,
            "machine": machine(),
            "machine_class": machine_class(),
            "lock_hash": lock_hash(),
            "versions": _versions(),
            "commit": head,
            "dirty": dirty,
            "started": now.isoformat(timespec="seconds"),
        }
    )
    writer.append(context)
    return writer, context


def resume() -> tuple[Writer, Context, Run]:
    """The newest unfinished run of this machine class. Raises UserError where every run has ended."""
    for path in reversed(runs()):
        run = Run(path)
        if run.end is None:
            return Writer(path.stem), run.context, run
    raise UserError("There is no unfinished run to resume on this machine; start one with adphys run.")


def go(writer: Writer, context: Context, before: Run | None, console: Console) -> list[CellRecord]:
    """Measure what the plan has and the file has not; returns all its records.

    One cell runs at a time, but where the preset has lanes, in which small cells of one thread are prepared and compiled side
    by side and take their samples in turn.
    """
    began = time.monotonic()
    known = {c.address: c for address in context.plan for c in cells(address)}
    records = {a: r for a, r in before.cells.items() if r.key == key(known[a])} if before else {}
    todo = [known[a] for a in context.plan if a not in records]
    wall_before = sum(r.wall_s for r in records.values())
    if before:
        console.print(
            f"{before.torn} " * bool(before.torn) + f"{len(records)} cells are in the ledger; {len(todo)} are left."
        )
    _references(todo, console)
    _floors(writer, context, before, [known[a] for a in context.plan], console)

    crowded: list[Cell] = []  # out of memory, or of time, beside another: again, alone

    def each(some: list[Cell], lanes: Sequence[list[int] | None], then: Callable[[CellRecord], None]) -> None:
        """Measures some cells side by side in the lanes, or one after the other where a cell says; `then` as they end."""
        began, bar = time.monotonic(), progress.add_task("", total=len(some), left="")
        free: SimpleQueue[list[int] | None] = SimpleQueue()
        for cpus in lanes:
            free.put(cpus)

        def step(cell: Cell) -> CellRecord | None:
            cpus = free.get()
            progress.update(bar, description=cell.address)
            try:
                found = _measure(cell, context, records, cpus)
                if found.status != "timeout" or len(lanes) == 1 or found.wall_s < context.limit_s:
                    return found
            except Crowded:
                pass
            finally:
                free.put(cpus)
            crowded.append(cell)
            return None

        with _side_by_side(len(lanes)) as pool:
            for k, future in enumerate(as_completed([pool.submit(step, cell) for cell in some]), 1):
                if found := future.result():
                    then(found)
                left = (time.monotonic() - began) / k * (len(some) - k)
                progress.update(bar, completed=k, left=f"about {_duration(left)} left")

    def keep(found: CellRecord) -> None:
        records[found.cell] = found
        writer.append(found)
        progress.console.print(line(found), soft_wrap=True, highlight=False)

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True) as progress:
        side_by_side = lanes() if PRESETS[context.preset].lanes else [None]
        beside, alone = ([c for c in todo if _may_be_beside(c) == one] for one in (True, False))
        each(beside, side_by_side, keep)
        one_lane = time.monotonic()
        each(alone + crowded, [None], keep)
        if PRESETS[context.preset].ways != "main":
            before_again = disturbance(list(records.values()))
            again = [known[a] for a, d in before_again.items() if d > DISTURBED and records[a].wall_s < AGAIN_S]

            def keep_calmer(found: CellRecord) -> None:  # faster or not
                now = disturbance([r for r in records.values() if r.cell != found.cell] + [found])
                if now.get(found.cell, math.inf) < before_again[found.cell]:
                    keep(found)

            each(again, [None], keep_calmer)
        one_lane = time.monotonic() - one_lane
    _as_is(writer, context, before, [known[a] for a in context.plan], console)
    wall = time.monotonic() - began + wall_before
    measured = sum(r.measured_s for r in records.values())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    writer.append(End(finished=now, wall_s=wall, measured_s=measured))
    both, where = len(side_by_side), ""
    share = measured / max(wall * both - one_lane * (both - 1), 1e-9)
    if both > 1:
        where = f" in each of {both} lanes"
    console.print(
        f"{len(records)} cells in {_duration(wall)}, {share:.0%} of it inside first and measured calls{where}."
    )
    return list(records.values())


def disturbance(records: list[CellRecord]) -> dict[str, float]:
    """Of every cell that says: how much somebody else's work, on this machine or on the one that it is a guest of, slowed it
    for as long as it ran; 1 is none.

    The larger of two ratios: the reference kernel's best time beside the cell to what it takes in the calmer quarter of the
    run, and the wall to the CPU seconds of the cell's quickest sample, which show a processor shared in turns.
    """
    kernels = {r.cell: _kernel(r) for r in records if r.status == "ok" and _kernel(r)}
    if len(kernels) < 4:
        return {}
    calm = statistics.quantiles(kernels.values(), n=4)[0]
    return {r.cell: max(kernels[r.cell] / calm, _shared(r)) for r in records if r.cell in kernels}


def _kernel(r: CellRecord) -> float:
    """The reference kernel's best time beside the derivative or the primal, the worse of both; 0 where too few were taken."""
    parts = ([t for p in r.processes for t in getattr(p, part).reference] for part in ("derivative", "primal"))
    return max((min(part) for part in parts if len(part) > 4), default=0.0)  # the first readings find cold caches


def _shared(r: CellRecord) -> float:
    if r.threads > 1 or r.device != "cpu":
        return 1.0
    parts = (getattr(p, part) for p in r.processes for part in ("derivative", "primal"))
    return max(wall / cpu if cpu else 1.0 for wall, cpu in (min(zip(p.wall, p.cpu, strict=True)) for p in parts))


def _references(todo: list[Cell], console: Console) -> None:
    """All judges first, tasks side by side: they are not timed, and nothing may run beside a cell that is."""
    by_task: dict[str, list[Cell]] = {}
    for cell in todo:
        if not known_status(cell)[0]:
            by_task.setdefault(cell.name, []).append(cell)

    def make(some: list[Cell]) -> None:
        for cell in some:
            with suppress(NoReference):  # the cell itself says so
                reference(cell)

    with console.status("Computing the references that judge the gradients"), _side_by_side(len(everywhere())) as pool:
        list(pool.map(make, by_task.values()))


def _as_is(writer: Writer, context: Context, before: Run | None, plan: list[Cell], console: Console) -> None:
    """Every form of the statements, unmodified, given to every library that takes NumPy code."""
    if PRESETS[context.preset].ways == "main":
        return
    asked = {(c.problem, c.task, c.backend): c for c in plan if _main(c) and c.device == "cpu" and c.dtype == "float64"}
    todo = [
        replace(c, form=form, natural=False, size="tiny", threads=1)
        for c in asked.values()
        if backend(c.backend).namespace is not None and known_status(c)[0] in ("", "unsupported", "missing")
        for form in tasks(c.problem)[c.task].forms
    ]
    have = {(r.problem, r.task, r.backend, r.form): r.key for r in before.as_is} if before else {}
    todo = [c for c in todo if have.get((c.problem, c.task, c.backend, c.form)) != key(c)]
    with console.status("Giving the statements to the libraries as they are"), _side_by_side(len(everywhere())) as pool:
        for found in pool.map(lambda c: as_is(c, context.limit_s), todo):
            writer.append(found)


@contextmanager
def _side_by_side(number: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads that start workers; who interrupts them stops the workers."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    except BaseException:
        STOP.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        STOP.clear()


def _measure(cell: Cell, context: Context, records: dict[str, CellRecord], cpus: list[int] | None) -> CellRecord:
    """Measured, or a timeout without being run where the smaller size says that it would be one."""
    if predicted := _will_break(cell, context, records):
        return record(cell, time.monotonic(), status="timeout", reason=predicted)
    return measure(cell, budget=context.budget_s, number=context.processes, limit=context.limit_s, cpus=cpus)


def _will_break(cell: Cell, context: Context, records: dict[str, CellRecord]) -> str:
    """The sentence where three times the time at the next smaller size, or forward mode's for each entry, breaks the limit."""
    if cell.size not in SIZES or known_status(cell)[0]:
        return ""
    for smaller in reversed(SIZES[: SIZES.index(cell.size)]):
        last = records.get(replace(cell, size=smaller).address)
        if last is None:
            continue
        if last.status == "timeout":
            return f"Not run: it already timed out at {smaller}."
        s = summary(last)
        took, limit = s.derivative.median if s else 0.0, context.limit_s
        if 3 * took > limit:
            return f"Not run: three times its {took:.0f} s at {smaller} would break the limit of {limit:.0f} s."
        if cell.strategy in FOR_EACH_ENTRY and last.blocks:
            try:
                times = sum(entries(cell).values()) / sum(block.size for block in last.blocks.values())
            except NoReference:  # the cell itself says so
                return ""
            growth = _growth(cell, smaller, records)
            if times * growth * took > limit:
                return (
                    f"Not run: theta has {times:.0f} times the entries of {smaller}, where the gradient took {took:.2g} s, and "
                    f"a primal takes {growth:.2g} times as long; it would break the limit of {limit:.0f} s."
                )
        return ""
    return ""


def _growth(cell: Cell, smaller: str, records: dict[str, CellRecord]) -> float:
    """How much longer a primal of this library takes than at the smaller size, by its main way there and here; 1 if unknown."""
    main = replace(cell, strategy=main_strategy(cell))
    both = [records.get(replace(main, size=size).address) for size in (cell.size, smaller)]
    here, there = (summary(r) if r else None for r in both)
    return max(1.0, here.primal.minimum / there.primal.minimum) if here and there else 1.0


def _floors(writer: Writer, context: Context, before: Run | None, plan: list[Cell], console: Console) -> None:
    """One triad a task and size that asks for it, beside the cells of the same run."""
    have = {(f.problem, f.task, f.size) for f in before.floors} if before else set()
    for cell in plan:
        block = tasks(cell.problem)[cell.task].floor
        if block and (cell.problem, cell.task, cell.size) not in have:
            have.add((cell.problem, cell.task, cell.size))
            try:
                writer.append(measure_floor(cell, block, context.budget_s / 2))
            except NoReference as e:
                console.print(f"{cell.name}@{cell.size} has no bandwidth floor: {e.reason}")


def sound(records: Iterable[CellRecord]) -> bool:
    """Whether every cell ended in a state that a sound suite may have."""
    return all(r.status in DECLARED for r in records)


def line(record: CellRecord) -> str:
    """One line a cell, for the terminal."""
    s = summary(record)
    if s is None:
        return f"{record.cell:58} {record.status}: {record.reason}"
    return f"{record.cell:58} {seconds(s.derivative.median):>9}  x{s.ratio:<6.3g} error {record.error or 0:.0e}"


def seconds(t: float) -> str:
    """1.23 us, 45.6 ms, 7.89 s: three digits."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if t < 999.5 * scale:
            return f"{t / scale:.3g} {unit}"
    return f"{t:.3g} s" if t < 999.5 else f"{t:.0f} s"


def _duration(t: float) -> str:
    return f"{t:.0f} s" if t < 90 else f"{t / 60:.0f} min"


def _versions() -> dict[str, str]:
    """Of everything that any backend needs here, and of the tools that write results."""
    names = {name for b in backends() if backend(b).env == "main" for name in backend(b).requires} | {
        "asv",
        "pandas",
        "pydantic",
    }
    found = {}
    for name in sorted(names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
