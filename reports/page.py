"""One report: its parts in the order in which they are read, and the two templates that give them a shape."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tabulate import tabulate

from harness import cells
from harness.ledger import Run
from reports import figures, tables, words


@dataclass(frozen=True)
class Picture:
    name: str
    svg: str
    alt: str
    caption: str

    def inline(self) -> Markup:
        return Markup(figures.inline(self.svg, self.name))


@dataclass
class TaskPart:
    name: str
    about: str
    figures: list[Picture]
    beside: list[tables.Beside]
    tables: list[tables.Table]


@dataclass
class Section:
    """What may stand side by side: one kind of reference, device, dtype, number of threads."""

    title: str
    about: str
    conclusions: list[str]
    matrices: list[Picture]
    tasks: list[TaskPart]


@dataclass
class Page:
    machine: str
    notices: list[str]
    counts: str
    sections: list[Section]
    strategies: list[tuple[str, str, str]]
    statuses: list[tuple[str, str]]
    rewriting: list[tables.Rewriting]
    wanted: list[tables.Wanted]
    all_cores: tables.AllCores | None
    provenance: tuple[list[str], list[list[str]]]
    noise: str
    columns: dict[str, str] = field(default_factory=lambda: tables.COLUMNS)
    text_columns: tuple[str, ...] = (*tables.TEXT, "task", "size")

    def pictures(self) -> Iterator[Picture]:
        for section in self.sections:
            yield from section.matrices
            yield from (picture for part in section.tasks for picture in part.figures)


def build(runs: list[Run], rows: pd.DataFrame) -> Page:
    rates = tables.floors(runs)
    sections = [_section(part, rates) for _, part in rows.groupby(tables.SETTING, sort=True)]
    machines = {f"{run.context.machine['cpu']}, {run.context.machine['cores']} cores" for run in runs}
    return Page(
        machine=" and ".join(sorted(machines)),
        notices=words.notices(runs, rows),
        counts=words.counts(rows),
        sections=sections,
        strategies=words.strategies(rows),
        statuses=list(words.STATUSES.items()),
        rewriting=tables.rewriting(runs, rows),
        wanted=tables.wanted(rows),
        all_cores=tables.all_cores(runs, rows),
        provenance=words.provenance(runs),
        noise=words.noise(rows),
    )


def render(template: str, page: Page) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=".html" in template,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"markup": words.markup, "literal": words.literal, "grid": grid}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(page=page))


def grid(rows: list[list[str]], columns: list[str], text: tuple[str, ...] | None = None) -> str:
    """A Markdown table, numbers to the right; all columns are text where none are named."""
    align = ["left" if text is None or name in text else "right" for name in columns]
    return tabulate(rows, columns, tablefmt="pipe", colalign=align, disable_numparse=True)


def _section(part: pd.DataFrame, rates: dict[tuple[str, str], tables.Rate]) -> Section:
    reference, device, dtype, threads = part[tables.SETTING].iloc[0]
    mark = "" if (device, dtype, threads) == tables.HOST else f"-{device}-{dtype}-{threads}"
    mark += "" if reference == "discrete" else f"-{reference}"
    title = f"{device.upper()}, {dtype}, {words.number_of(threads, 'thread')}"
    about = {
        "discrete": "Every gradient here is judged against the exact derivative of the fixed-step program.",
        "continuous": "Gradients here are judged against the derivative of the differential equation's solution: "
        "the error is part of the result, and a time without its error says nothing.",
    }.get(reference, "This version of the code does not know what these gradients were judged against.")
    by_task = dict(list(part.groupby("task")))
    shown = [p.loc[p["size"] == tables.shown_size(p)] for p in by_task.values()]
    return Section(
        title if reference == "discrete" else f"{title}, {reference} reference",
        about,
        words.overall(pd.concat(shown), tables.NOT_AD)
        + [words.conclusion(p, tables.short_size(p), tables.NOT_AD) for p in shown]
        + [said for p in by_task.values() if (said := words.crossover(p))],
        list(_matrices(by_task, mark)),
        [_task(str(name), p, rates, mark) for name, p in by_task.items()],
    )


def _matrices(by_task: dict[Any, pd.DataFrame], mark: str) -> Iterator[Picture]:
    """Each task at the size that stands for it; then, where that is another one, at each named size."""
    picks = {name: tables.shown_size(p) for name, p in by_task.items()}
    yield _matrix(by_task, picks, f"matrix{mark}", "The whole matrix at a glance")
    for size in reversed(cells.SIZES):
        here = {name: size for name, p in by_task.items() if size in set(p["size"])}
        if any(picks[name] != size for name in here):
            yield _matrix(by_task, here, f"matrix-{size}{mark}", f"The same at the size {size}")


def _matrix(by_task: dict[Any, pd.DataFrame], picks: dict[Any, str], name: str, title: str) -> Picture:
    rows = pd.concat([p.loc[p["size"] == picks[task]] for task, p in by_task.items() if task in picks])
    heads = {str(task): tables.short_size(p) for task, p in rows.groupby("task")}
    absent = sorted({w for p in by_task.values() for w in p.way} - set(rows.way))
    caption = (
        f"{title}: time of the derivative over that of the hand adjoint, ways ordered by their median ratio. "
        "An empty field: this ledger has no such cell."
    )
    if absent:
        caption += f" Not asked for at these sizes: {words.names(absent)}."
    extent = f"{words.number_of(len(heads), 'task')} by {words.number_of(rows.way.nunique(), 'way')}"
    alt = f"{title}: {extent}; the tables below hold the same numbers."
    return Picture(name, figures.matrix(rows, heads), alt, caption)


def _task(name: str, part: pd.DataFrame, rates: dict[tuple[str, str], tables.Rate], mark: str) -> TaskPart:
    own = {size: rate for (task, size), rate in rates.items() if task == name}
    svg, off = figures.scaling(part, own if part.floor_s.notna().any() else {})
    caption = f"Time of the derivative of {name} against {part.axis.iloc[0]}; the thick line is the hand adjoint."
    named = part.loc[part["size"].isin(cells.SIZES)]
    if len(named) and tables.other_keys(named).nunique() > 1:
        caption += f" From size to size more than {part.axis.iloc[0]} changes: see the titles of the tables."
    if off:
        caption += f" Sizes that differ in more than {part.axis.iloc[0]} are in the tables only: {'; '.join(off)}."
    alt = f"Derivative time of {name} against size, one line a way; the tables below hold the same numbers."
    pictures = [Picture(f"{name}{mark}", svg, alt, caption)] if svg else []
    if drawn := figures.work_precision(part):
        caption = (
            f"Time of the derivative of {name} against its error, a tolerance a point: further left is more exact."
        )
        alt = f"Derivative time of {name} against error, one line a way; the tables below hold the same numbers."
        pictures.append(Picture(f"{name}{mark}-tolerances", drawn, alt, caption))
    if drawn := figures.memory(part):
        caption = f"Time of the derivative of {name} against peak memory, where checkpoints save most."
        alt = f"Derivative time of {name} against peak memory, one point a way; the tables below hold the same numbers."
        pictures.append(Picture(f"{name}{mark}-memory", drawn, alt, caption))
    task = tables.known(*name.split(".", 1))
    at = [part.loc[part["size"] == size] for size in tables.sizes(part)]
    return TaskPart(
        name,
        _about(str(part.problem.iloc[0])),
        pictures,
        [*tables.headline(part, task.published if task else None), *tables.middle(part)],
        [tables.table(p, own.get(str(p["size"].iloc[0]))) for p in at],
    )


def _about(problem: str) -> str:
    """What the statement says of itself in its first sentences."""
    if problem not in cells.problems():
        return ""
    try:
        doc = importlib.import_module(f"problems.{problem}").__doc__ or ""
    except Exception:  # whatever a broken file does when it is imported: the report of what it gave earlier goes on
        return ""
    return " ".join(doc.strip().split("\n\n")[0].split())
