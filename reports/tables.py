"""From the ledger to rows: one pandas frame with a row a cell, ratios included, and the tables that are cut from it.

Ratios are of minima, and only of cells at the same task, size, device, dtype and number of threads.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd

from harness import ROOT, UserError, cells, source
from harness.ledger import AsIs, CellRecord, Floor, Run, Status
from harness.statistics import Summary, summary, timing
from problems import Published, Task
from reports.words import amount, error, names, ratio, seconds

SETTING = ["reference", "device", "dtype", "threads"]  # never mixed in one table or picture
PLACE = ["task", "size", *SETTING[1:]]  # where two cells can be compared
AROUND = ("backsolve", "interpolating", "quadrature", "sensitivity")
NOT_AD = ("adjoint", *cells.APPROXIMATE_OR_SLOW)
HOST = ("cpu", "float64", 1)  # what the bandwidth floor is measured for
ENOUGH = 0.8  # of the copy's rate: below it the triad is no floor

COLUMNS = {
    "way": "backend.form/strategy; the natural form of the backend goes unnamed",
    "form": "how the code is written",
    "status": "ok, or why there is no number; the sentence is below the table",
    "primal": "the loss alone: median",
    "derivative": "loss and gradient: median (quartiles)",
    "derivative / primal": "what the gradient costs in units of this way's own loss; ratio of minima",
    "derivative / hand adjoint": "in units of the reverse pass written by hand; ratio of minima",
    "× floor": "in units of the bandwidth floor; ratio of minima",
    "first call": "cold, in a fresh process: prepare, trace, compile, run",
    "peak memory": "of one call, buffers included",
    "error": "relative 2-norm error of the worst block of the gradient",
    "solver": "what a gradient's solver counted of its primal: the same numbers are the same work",
    "lines": "lines of code of this way",
    "rewritten": "of these, lines that the nearest form of the NumPy statement does not have: what must be rewritten",
}
TEXT = ("way", "form", "status", "solver")  # the columns that are not numbers


@dataclass(frozen=True)
class Rate:
    """The bandwidth floor of a task at a size."""

    seconds: float
    triad: float  # GB/s: two arrays read, one written
    copy: float  # GB/s: one read, one written


@dataclass(frozen=True)
class Table:
    """Rows as (text, number to sort by), the ok ones first and by speed; then the sentences of the others."""

    size: str
    caption: str
    columns: list[str]
    rows: list[list[tuple[str, Any]]]
    notes: list[tuple[str, str]]  # ways, sentence
    floor: str

    def plain(self) -> list[list[str]]:
        return [[text for text, _ in row] for row in self.rows]


@dataclass(frozen=True)
class Rewriting:
    """Of one task: what becomes of the statement's forms in each library, and the way that needs the fewest new lines."""

    task: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


@dataclass(frozen=True)
class Beside:
    """Of one task a table more, with the way first: what others published beside what was measured here, say."""

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Wanted:
    """Where the exact derivative of a program is not that of its equations: a table, and what to do."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class AllCores:
    """Every way that was measured on all processors of the machine, beside what it takes on one."""

    cores: int
    columns: list[str]
    rows: list[list[str]]


def known(problem: str, task: str) -> Task | None:
    """The task in this code; None where the ledger is of another version, or the problem's file is broken."""
    try:
        return cells.tasks(problem).get(task) if problem in cells.problems() else None
    except UserError:
        return None


def frame(runs: list[Run]) -> pd.DataFrame:
    """One row a cell, the later record where several runs have it. Raises UserError where there is nothing to compare."""
    contexts = [run.context for run in runs]
    if len(machines := sorted({c.machine_class for c in contexts})) > 1:
        raise UserError(
            f"These ledgers are of different machines ({', '.join(machines)}), whose times cannot stand in one table; "
            "give the ledgers of one machine class."
        )
    if len(protocols := sorted({str(c.protocol) for c in contexts})) > 1:
        raise UserError(
            f"These ledgers follow different protocols ({', '.join(protocols)}), whose numbers cannot be compared; "
            "give the ledgers of one protocol."
        )
    latest: dict[tuple, tuple[CellRecord, str, str]] = {}
    written: dict[tuple, str] = {}  # a size is the same however its keys were written: as they were at first
    for run in sorted(runs, key=lambda r: r.context.started):
        for record in run.cells.values():
            named = record.size if record.size in cells.SIZES else _written(record.size_keys)
            size = written.setdefault((record.problem, record.task, named), record.size)
            same = record.problem, record.task, record.way, named, record.device, record.dtype, record.threads
            if same not in latest or record.finished >= latest[same][0].finished:
                latest[same] = record, size, run.context.run
    if not latest:
        raise UserError("There is no finished cell in the ledger yet; run `adphys run --preset quick` first.")
    rates = floors(runs)
    found = pd.DataFrame([_row(record, run, rates) | {"size": size} for record, size, run in latest.values()])
    hand = found[found.strategy == "adjoint"].groupby(PLACE).derivative_min_s.min().rename("adjoint_s").reset_index()
    found = found.merge(hand, on=PLACE, how="left")
    found["derivative_over_primal"] = found.derivative_min_s / found.primal_min_s
    found["derivative_over_adjoint"] = found.derivative_min_s / found.adjoint_s
    found["derivative_over_floor"] = found.derivative_min_s / found.floor_s
    found = found.astype(dict.fromkeys(("peak_memory_bytes", "gradient_entries", "lines", "changed"), "Int64"))
    found["_rank"] = found.status.map(get_args(Status).index)
    order = ["task", *SETTING, "axis_value", "size", "derivative_median_s", "_rank", "way"]
    return found.sort_values(order, na_position="last", ignore_index=True).drop(columns="_rank")


def floors(runs: list[Run]) -> dict[tuple[str, str], Rate]:
    """(task, size) -> the floor measured last."""
    every = sorted((f for run in runs for f in run.floors), key=lambda f: f.finished)
    return {(f"{f.problem}.{f.task}", f.size): _rate(f) for f in every}


def _rate(f: Floor) -> Rate:
    triad, copy = timing([f.triad]).minimum, timing([f.copy_]).minimum
    return Rate(triad, 3 * f.bytes / triad / 1e9, 2 * f.bytes / copy / 1e9)


def _row(record: CellRecord, run: str, rates: dict[tuple[str, str], Rate]) -> dict[str, Any]:
    task, s = known(record.problem, record.task), summary(record)
    axis = task.axis if task and task.axis in record.size_keys else next(iter(record.size_keys), "")
    rate = rates.get((name := f"{record.problem}.{record.task}", record.size))
    on_host = (record.device, record.dtype, record.threads) == HOST
    return {
        "cell": record.cell,
        "problem": record.problem,
        "task": name,
        "known": task is not None,
        "reference": task.reference if task else "unknown",
        "backend": record.backend,
        "form": record.form,
        "strategy": record.strategy,
        "way": record.way,
        "size": record.size,
        "size_keys": _written(record.size_keys),
        "axis": axis,
        "axis_value": record.size_keys.get(axis),
        "device": record.device,
        "dtype": record.dtype,
        "threads": record.threads,
        "status": record.status,
        "reason": re.sub(r"\s+", " ", record.reason.replace(f"{ROOT}/", "")),
        **_times(s),
        "peak_memory_bytes": s.memory if s else None,
        "error": record.error,
        "error_all": _error_of_all(record),
        "solver": _counted(record),
        "solves_s": _stats(record).get("solves_s"),
        "gate": record.gate,
        "judge": record.judge,
        "loss": record.loss,
        "loss_error": record.loss_error,
        "gradient_norm": _norm(b.norm for b in (record.blocks or {}).values()),
        "reference_norm": _norm(b.reference_norm for b in (record.blocks or {}).values()),
        "gradient_entries": sum(b.size for b in record.blocks.values()) if record.blocks else None,
        "lines": record.lines,
        "changed": record.changed,
        "floor_s": rate.seconds if rate and on_host else None,
        "processes": len(record.processes),
        "samples": sum(len(p.derivative.wall) for p in record.processes),
        "process_spread": _spread(record) if s else None,
        "load1_max": max((p.load1 for p in record.processes), default=None),
        "commit": record.commit,
        "dirty": record.dirty,
        "finished": record.finished,
        "run": run,
    }


def _norm(blocks: Iterable[float | None]) -> float | None:
    """Of all blocks together; None where one has none."""
    found = list(blocks)
    return sum(n**2 for n in found if n is not None) ** 0.5 if found and None not in found else None


def _error_of_all(record: CellRecord) -> float | None:
    """Relative 2-norm error over all entries of all blocks, which large blocks rule."""
    blocks = [(b.error, b.reference_norm) for b in (record.blocks or {}).values()]
    off = _norm(None if e is None or norm is None else e * norm for e, norm in blocks)
    norm = _norm(norm for _, norm in blocks)
    return off / norm if off is not None and norm else None


def _written(size_keys: dict[str, float]) -> str:
    return ",".join(f"{key}={value:.15g}" for key, value in size_keys.items())


def _stats(record: CellRecord) -> dict[str, float]:
    return (record.processes[0].stats if record.processes else None) or {}


def _counted(record: CellRecord) -> str:
    """`19 steps, 95 linear solves`"""
    stats = _stats(record)
    return ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in stats.items() if name != "solves_s")


def _times(s: Summary | None) -> dict[str, float | None]:
    times: dict[str, float | None] = {}
    for what in ("derivative", "primal"):
        for field, short in (("median", "median"), ("q1", "q1"), ("q3", "q3"), ("minimum", "min")):
            times[f"{what}_{short}_s"] = getattr(getattr(s, what), field) if s else None
    return times | {"first_call_s": s.first_call if s else None}


def _spread(record: CellRecord) -> float:
    """How far the processes' own minima lie apart, largest over smallest."""
    minima = [min(p.derivative.wall) for p in record.processes]
    return max(minima) / min(minima)


def sizes(part: pd.DataFrame) -> list[str]:
    """The sizes of one task, the largest first."""
    order = part.drop_duplicates("size").sort_values(["axis_value", "size"], ascending=False)
    return [str(size) for size in order["size"]]


def shown_size(part: pd.DataFrame) -> str:
    """The size of one task that stands for it: large where most of its ways are there, else small, tiny, the largest."""
    have = sizes(part)
    ways = part.groupby("size").way.nunique()
    named = [size for size in reversed(cells.SIZES) if size in have and 2 * ways[size] > ways.max()]
    return (named or have)[0]


def size_title(part: pd.DataFrame) -> str:
    """Of one task at one size: `large: N = 256, alpha = 10`."""
    size, keys = str(part["size"].iloc[0]), str(part["size_keys"].iloc[0])
    keys = keys.replace("=", " = ").replace(",", ", ")
    return f"{size}: {keys}" if size in cells.SIZES else keys


def other_keys(part: pd.DataFrame) -> pd.Series:
    """Of one task: the size without the key on the horizontal axis."""
    return without(part, [part.axis.iloc[0]])


def without(part: pd.DataFrame, keys: Iterable[str]) -> pd.Series:
    """The sizes without some of their keys."""
    return part.size_keys.str.replace(rf"(^|,)({'|'.join(keys)})=[^,]*", "", regex=True)


def short_size(part: pd.DataFrame) -> str:
    """Of one task at one size: `large, N = 256`."""
    size, at = str(part["size"].iloc[0]), f"{part.axis.iloc[0]} = {part.axis_value.iloc[0]:g}"
    return f"{size}, {at}" if size in cells.SIZES else at


def table(part: pd.DataFrame, rate: Rate | None) -> Table:
    """Of one task at one size in one setting."""
    columns = [name for name in COLUMNS if (name != "× floor" or rate) and (name != "solver" or part.solver.any())]
    notes: dict[str, list[str]] = {}
    rows = []
    for r in part.to_dict("records"):
        status = r["status"]
        if status != "ok":
            notes.setdefault(r["reason"] or "No sentence was recorded.", []).append(r["way"])
            status += f" [{list(notes).index(r['reason'] or 'No sentence was recorded.') + 1}]"
        row = {
            "way": (r["way"], None),
            "form": (r["form"], None),
            "status": (status, None),
            "primal": (seconds(r["primal_median_s"]), r["primal_median_s"]),
            "derivative": (
                seconds(r["derivative_median_s"], r["derivative_q1_s"], r["derivative_q3_s"]),
                r["derivative_median_s"],
            ),
            "derivative / primal": (ratio(r["derivative_over_primal"]), r["derivative_over_primal"]),
            "derivative / hand adjoint": (ratio(r["derivative_over_adjoint"]), r["derivative_over_adjoint"]),
            "× floor": (ratio(r["derivative_over_floor"]), r["derivative_over_floor"]),
            "first call": (seconds(r["first_call_s"]), r["first_call_s"]),
            "peak memory": (amount(r["peak_memory_bytes"]), r["peak_memory_bytes"]),
            "error": (error(r["error"]), r["error"]),
            "solver": (r["solver"], None),
            "lines": (amount(r["lines"], ""), r["lines"]),
            "rewritten": (amount(r["changed"], ""), r["changed"]),
        }
        rows.append([(text, None if pd.isna(number) else number) for text, number in (row[name] for name in columns)])
    return Table(
        size_title(part),
        _caption(part),
        columns,
        rows,
        [(names(dict.fromkeys(ways)), sentence) for sentence, ways in notes.items()],
        _floor_sentence(rate, part) if rate else "",
    )


def headline(part: pd.DataFrame, published: Published | None) -> Iterator[Beside]:
    """What others published beside what was measured here, where something was measured at the published size keys."""
    if published is None:
        return
    axis = part.axis.iloc[0]
    ours = part.loc[(part.status == "ok") & (other_keys(part).map(_keys) == published.keys)]
    if ours.empty:
        return
    places = sorted({*ours.axis_value, *(x for row in published.seconds.values() for x in row)})
    last = max(x for row in published.seconds.values() for x in row)
    rows = [
        [f"{name} (published)", *(seconds(row.get(x)) for x in places), error(published.error.get(name)), ""]
        for name, row in published.seconds.items()
    ]
    for way, own in sorted(ours.groupby("way"), key=lambda pair: pair[1].derivative_median_s.max()):
        at = own.drop_duplicates("axis_value").set_index("axis_value")
        errors = [at[kind].get(last) for kind in ("error_all", "error")]
        rows.append([f"`{way}`", *(seconds(at.derivative_median_s.get(x)) for x in places), *map(error, errors)])
    best = min(row[last] for row in published.seconds.values() if last in row)
    here = ours.loc[ours.axis_value == last].sort_values("derivative_median_s")
    said = f"Seconds a gradient, as published and as measured here. Published: {published.source}. {published.differs}"
    for what, some in (
        ("hand adjoint", here[here.strategy == "adjoint"]),
        ("fastest AD", here[~here.strategy.isin(NOT_AD)]),
    ):
        if len(some):
            way, times = some.way.iloc[0], some.derivative_median_s.iloc[0] / best
            times = f"1/{1 / times:.0f}" if times < 0.5 else ratio(times)
            said += f" At {axis} = {last:g} the {what}, `{way}`, takes {times} of the time of the quickest published."
    columns = [
        "method",
        *(f"{axis} = {x:g}" for x in places),
        f"error of all entries at {axis} = {last:g}",
        "of the worst block",
    ]
    yield Beside("beside what was published", said, columns, rows)


def middle(part: pd.DataFrame) -> Iterator[Beside]:
    """Of one task in one setting, a size a table: the gradient without its solves, where those were timed alone."""
    part = part.loc[(part.status == "ok") & ~part.strategy.isin(("checkpoint", "forward", *cells.APPROXIMATE_OR_SLOW))]
    for size in sizes(part.loc[part.solves_s.notna()]):
        here = part.loc[part["size"] == size].sort_values("derivative_median_s")
        rest = here.derivative_median_s - here.solves_s
        hand = rest[here.strategy == "adjoint"].min()
        rows = [
            [f"`{r.way}`", *map(seconds, (r.derivative_median_s, r.solves_s, own)), ratio(own / hand), _doc(r)]
            for r, own in zip(here.itertuples(), rest, strict=True)
        ]
        yield Beside(
            f"{here.size_keys.iloc[0]}, without its solves",
            "Every step assembles a matrix, factorises it and solves: mutation meets linear algebra. The solves of a gradient "
            "were timed alone, on the same matrices by the same code, and are taken off; how each library met them is its "
            "author's sentence.",
            ["way", "derivative", "its solves", "without them", "of the hand adjoint's", "how"],
            rows,
        )


def _doc(row: Any) -> str:
    return source.said(
        cells.Cell(row.problem, row.task.partition(".")[2], row.backend, row.form, True, row.strategy, row.size)
    )


def _keys(text: str) -> dict[str, float]:
    """`T=1,alpha=10` as a dict."""
    return {name: float(value) for name, value in (item.split("=") for item in text.strip(",").split(","))}


def rewriting(runs: list[Run], rows: pd.DataFrame) -> list[Rewriting]:
    """A table a task, of those that some library was given as they are."""
    latest = {
        (f"{r.problem}.{r.task}", r.backend, r.form): r
        for r in sorted((r for run in runs for r in run.as_is), key=lambda r: r.finished)
    }
    found = []
    for task in sorted({name for name, _, _ in latest}):
        forms = sorted({form for name, _, form in latest if name == task})
        libraries = sorted({library for name, library, _ in latest if name == task})
        notes: list[str] = []
        table = []
        for library in libraries:
            tried = [latest.get((task, library, form)) for form in forms]
            table.append([library, *(_outcome(r, notes) for r in tried), *_nearest_way(rows, task, library)])
        columns = [
            "library",
            *(f"{form}, as is" for form in forms),
            "fewest new lines",
            "way",
            "derivative / hand adjoint",
        ]
        found.append(Rewriting(task, columns, table, notes))
    return found


def _outcome(tried: AsIs | None, notes: list[str]) -> str:
    if tried is None:
        return "not tried"
    if tried.status == "ok":
        return "runs"
    said = tried.reason if len(tried.reason) <= 200 else f"{tried.reason[:200]}..."
    if said not in notes:
        notes.append(said)
    what = {"wrong": "**wrong**", "error": "refused"}.get(tried.status, tried.status)
    return f"{what} [{notes.index(said) + 1}]"


def _nearest_way(rows: pd.DataFrame, task: str, library: str) -> list[str]:
    """(lines, way, ratio) of the ok way at the size shown that has the fewest lines which no form of the statement has."""
    part = rows.loc[(rows.task == task) & (rows.device == "cpu")]
    part = part.loc[(part["size"] == shown_size(part)) & (part.backend == library) & (part.status == "ok")]
    part = part.loc[~part.strategy.isin(NOT_AD) & part.changed.notna()]
    if part.empty:
        return ["", "", ""]
    best = part.sort_values(["changed", "derivative_min_s"]).iloc[0]
    return [f"{best.changed} of {best.lines}", str(best.way), ratio(best.derivative_over_adjoint)]


def wanted(rows: pd.DataFrame) -> list[Wanted]:
    """Of what the ledger has: loops that stop early, and adjoints around a solver."""
    one = rows.loc[(rows.status == "ok") & (rows.device == "cpu") & (rows.dtype == "float64") & (rows.threads == 1)]
    found = []
    if early := [row for name, part in one.groupby("task") for row in _stopped_early(str(name), part)]:
        found.append(
            Wanted(
                "A loop that stops at a tolerance",
                "The program's own derivative lags behind its solution: an iteration that changes the solution by less than the "
                "tolerance may still change the derivative by a hundred times as much. So converge further than the solution "
                "needs, or use `implicit`, which here iterates on to the root, whatever tolerance the size says, and applies the "
                "implicit function theorem there. Errors are relative to the derivative of the converged solution.",
                ["task", "size", "program", "off", "at the root", "off "],
                early,
            )
        )
    solved = one.loc[(one.reference == "continuous") & ~one.strategy.isin(cells.APPROXIMATE_OR_SLOW)]
    if solved.strategy.isin(AROUND).any():
        have = solved[solved.strategy.isin(AROUND)][["task", "size"]].drop_duplicates()
        no = rows.loc[rows.strategy.isin(AROUND) & (rows.status == "unsupported")].drop_duplicates(["task", "way"])
        beside = solved.merge(have, on=["task", "size"]).sort_values(["task", "axis_value", "size_keys", "error"])
        found.append(
            Wanted(
                "Through the solver, or around it",
                "The same solution, differentiated step by step (discrete: exact for the steps that were taken, and as good as "
                "they are) or by an adjoint equation that a solver integrates with an error of its own (`backsolve` runs the "
                "solution backwards beside it and stores nothing; `interpolating` stores it). Where the steps' lengths are "
                "differentiated with them, that is in the error too. Errors are relative to the derivative of the solution."
                + "".join(f" Not at all {r.task} by `{r.way}`: {r.reason}" for r in no.itertuples()),
                ["task", "size", "way", "derivative", "error", "solver"],
                [
                    [r.task, r.size_keys, f"`{r.way}`", seconds(r.derivative_median_s), error(r.error), r.solver]
                    for r in beside.itertuples()
                ],
            )
        )
    return found


def _stopped_early(name: str, part: pd.DataFrame) -> list[list[str]]:
    """A row a size of a task that says where its loop has converged, of one number to differentiate by."""
    task = known(*name.split(".", 1))
    if not (task and task.converged) or part.gradient_entries.max() != 1:
        return []
    roots = part.loc[part.strategy == "implicit"].sort_values("derivative_median_s")
    programs = part.loc[part.strategy.isin(("adjoint", "reverse", "tape"))].sort_values("derivative_median_s")
    found = []
    for _, program in programs.drop_duplicates("size").sort_values("cell").iterrows():
        root = roots.loc[without(roots, task.converged) == without(program.to_frame().T, task.converged).iloc[0]]
        if len(root):
            at = root.iloc[0]
            off = error(abs(program.gradient_norm / at.reference_norm - 1))
            found.append([name, str(program.size_keys), f"`{program.way}`", off, f"`{at.way}`", error(at.error)])
    return found


def all_cores(runs: list[Run], rows: pd.DataFrame) -> AllCores | None:
    """None where the ledger has no cell on all processors, or the machine only one."""
    cores = max(int(run.context.machine["cores"] or 1) for run in runs)
    many = rows.loc[(rows.threads == cores) & (rows.device == "cpu")]
    if cores == 1 or many.empty:
        return None
    on = ["task", "size", "way", "reference", "device", "dtype"]
    both = many.merge(rows.loc[rows.threads == 1], on=on, how="left", suffixes=("", "_one"))
    columns = {
        "task": both["task"],
        "size": both["size"],
        "way": "`" + both.way + "`",
        "1 thread": both.derivative_median_s_one.map(seconds),
        f"{cores} threads": both.derivative_median_s.map(seconds).where(both.status == "ok", both.status),
        "speed-up": (both.derivative_min_s_one / both.derivative_min_s).map(ratio),
        "speed-up of the primal": (both.primal_min_s_one / both.primal_min_s).map(ratio),
    }
    return AllCores(cores, list(columns), pd.DataFrame(columns).to_numpy().tolist())


def _caption(part: pd.DataFrame) -> str:
    entries, gates, judges = part.gradient_entries.max(), part.gate.min(), sorted(part.judge.dropna().unique())
    said = [f"gradient of {entries:,.0f} entries"] if pd.notna(entries) else []
    said += [f"gate {gates:.0e}"] if pd.notna(gates) else []
    said += [f"judged by {' or by '.join(judges)}"] if judges else []
    return "; ".join(said)


def _floor_sentence(rate: Rate, part: pd.DataFrame) -> str:
    share = rate.triad / rate.copy
    said = (
        f"Bandwidth floor: one triad a = b + s c over arrays as large as the largest block takes {seconds(rate.seconds)} "
        f"({rate.triad:.3g} GB/s, {share:.2f} of the {rate.copy:.3g} GB/s of a plain copy)."
    )
    if share < ENOUGH:
        said += f" That is below {ENOUGH} of the copy: on this machine, in this run, it is no floor to trust."
    if part.floor_s.isna().all():
        said += " It was measured on the CPU in float64 with one thread, so nothing here is compared with it."
    return said
