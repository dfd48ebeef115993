"""What is said: numbers as text, and the sentences that are computed from the rows."""

import re
from collections.abc import Iterable
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from backends import STRATEGIES
from harness.ledger import Run

STATUSES = {
    "ok": "The gradient was right, and then timed.",
    "unsupported": "The library cannot do this; the author's attempt is in the code, and a test sees it fail.",
    "missing": "Nobody wrote this yet: an invitation.",
    "unavailable": "A library, a compiler or a device is not on this machine.",
    "wrong": "The gradient is further from the reference than the gate allows; it gets no time.",
    "diverged": "A solver did not get there.",
    "invalid": "It broke a rule of measurement: inputs changed, result not waited for, wrong dtype or device.",
    "timeout": "It took longer than the limit, or would have, by what the smaller size took.",
    "oom": "Memory ran out.",
    "crashed": "The process died.",
    "error": "An exception.",
}
NONE = "–"
FORWARD, REVERSE = ("forward", "duals"), ("adjoint", "reverse", "tape", "func", "compile", "custom_rule", "implicit")
CHEAP = 5  # primals: what reverse mode costs at most by operation counts (Griewank and Walther, ch. 3)


def seconds(t: float | None, *others: float) -> str:
    """`2.05 ms`; `2.05 ms (2.03–2.31)` with the others in the unit of the first."""
    if t is None or pd.isna(t):
        return NONE
    scale, unit = next(((s, u) for s, u in ((1e-6, "µs"), (1e-3, "ms")) if t < 999.5 * s), (1.0, "s"))
    return f"{_three(t / scale)} {unit}" + (f" ({'–'.join(_three(x / scale) for x in others)})" if others else "")


def ratio(x: float | None) -> str:
    return NONE if x is None or pd.isna(x) else _three(x)


def _three(x: float) -> str:
    """Three digits, never in powers of ten: 0.934, 8.10, 89,400."""
    if x >= 1000:
        return f"{float(f'{x:.3g}'):,.0f}"
    text = f"{x:#.3g}"
    return text.rstrip(".") if "e" not in text else f"{x:.1g}"


def amount(n: float | None, unit: str = "B") -> str:
    """Bytes in binary units; a plain count where the unit is empty."""
    if n is None or pd.isna(n):
        return NONE
    if not unit:
        return f"{n:.0f}"
    for prefix in ("", "Ki", "Mi", "Gi"):
        if n < 999.5 or prefix == "Gi":
            return f"{n:.3g} {prefix}{unit}"
        n /= 1024
    raise AssertionError


def error(e: float | None) -> str:
    return NONE if e is None or pd.isna(e) else f"{e:.1e}"


def names(ways: Iterable[str]) -> str:
    """`a`, `b` and `c`."""
    quoted = [f"`{way}`" for way in ways]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def number_of(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 'es' if noun.endswith('s') else 's'}"


def markup(sentence: str) -> Markup:
    """A sentence with `code` and **strong** as HTML."""
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(sentence)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html))


def literal(sentence: str) -> str:
    """A sentence that somebody's library wrote, so that Markdown leaves it as it is."""
    return re.sub(r"([*<]|(?<!\w)_|_(?!\w))", r"\\\1", sentence)


def conclusion(part: pd.DataFrame, title: str, not_ad: tuple[str, ...]) -> str:
    """Of one task at one size: the fastest correct AD way, how far it is from the hand adjoint, whom it cannot be told from."""
    task = part.task.iloc[0]
    ok = part.loc[part.status == "ok"]
    ad = ok.loc[~ok.strategy.isin(not_ad)].sort_values("derivative_median_s")
    if ad.empty:
        return f"**{task}** ({title}): no AD way is ok among {number_of(len(part), 'cell')}; the table says why."
    best, hand = ad.iloc[0], ok.loc[ok.strategy == "adjoint"].sort_values("derivative_min_s")
    said = f"**{task}** ({title}): the fastest AD is `{best.way}`, {seconds(best.derivative_median_s)}, "
    if hand.empty:
        said += "with no hand adjoint here to compare it with"
    else:
        said += f"{ratio(best.derivative_over_adjoint)} times the hand adjoint (`{hand.way.iloc[0]}`, "
        said += f"{seconds(hand.derivative_median_s.iloc[0])})"
    said += f" and {ratio(best.derivative_over_primal)} times its own primal."
    if list(close := ad.iloc[1:][ad.derivative_q1_s.iloc[1:] <= best.derivative_q3_s].way):
        said += f" Its quartiles overlap with those of {names(close)}: too close to call."
    if not hand.empty and pd.notna(x := hand.derivative_over_floor.iloc[0]):
        said += f" The hand adjoint takes {ratio(x)} times the bandwidth floor."
    return said


def crossover(part: pd.DataFrame) -> str:
    """Of one task over its sizes: up to how many entries of theta a library's forward mode beats its own reverse mode."""
    ok = part.loc[(part.status == "ok") & part.strategy.isin((*FORWARD, *REVERSE))]
    ok = ok.assign(mode=ok.strategy.isin(FORWARD).map({True: "forward", False: "reverse"}))
    said = []
    for library, own in ok.groupby("backend"):
        best = own.groupby(["gradient_entries", "mode"]).derivative_min_s.min().unstack()
        if len(best.columns) < 2 or len(best := best.dropna()) < 2:
            continue
        wins = best.index[best.forward < best.reverse]
        loses = best.index[best.forward >= best.reverse]
        if not len(wins):
            said.append(f"`{library}` reverse already at {loses[0]:,}, the fewest here")
        elif not len(loses):
            said.append(f"`{library}` forward up to {wins[-1]:,}, the most here")
        elif wins[-1] < loses[0]:
            said.append(f"`{library}` forward up to {wins[-1]:,}, reverse from {loses[0]:,} on")
        else:
            said.append(f"`{library}` no clear crossover between {loses[0]:,} and {wins[-1]:,}")
    if not said:
        return ""
    return f"**{part.task.iloc[0]}**, which mode is faster by the entries of theta: {'; '.join(said)}."


def counts(rows: pd.DataFrame) -> str:
    """`15 cells: 14 ok, 1 oom`."""
    found = rows.status.value_counts()
    return f"{number_of(len(rows), 'cell')}: {', '.join(f'{found[s]} {s}' for s in STATUSES if s in found)}"


def overall(shown: pd.DataFrame, not_ad: tuple[str, ...]) -> list[str]:
    """What a whole matrix says: each task at the size that stands for it."""
    said = []
    ad = shown.loc[(shown.status == "ok") & ~shown.strategy.isin(not_ad)]
    far = ad.derivative_over_adjoint.dropna()
    if len(far):
        said.append(
            f"AD takes {ratio(far.min())} to {ratio(far.max())} times as long as the hand adjoint, "
            f"{ratio(far.median())} in the median over {number_of(len(far), 'cell')} of {number_of(ad.task.nunique(), 'task')}."
        )
    flattered = ad.loc[ad.derivative_over_primal < CHEAP]
    flattered = flattered.assign(slow=flattered.derivative_over_adjoint / flattered.derivative_over_primal).dropna(
        subset="slow"
    )
    if len(flattered) and (worst := flattered.loc[flattered.slow.idxmax()]).slow > 2:
        said.append(
            f"A low derivative/primal can mean a slow primal: `{worst.way}` on {worst.task} takes "
            f"{ratio(worst.derivative_over_primal)} times its own primal, but {ratio(worst.derivative_over_adjoint)} "
            "times the hand adjoint."
        )
    if len(ad):
        dear = ad.loc[ad.first_call_s.idxmax()]
        said.append(
            f"The dearest first call of an AD way is that of `{dear.way}` on {dear.task}: {seconds(dear.first_call_s)}, "
            f"as long as {dear.first_call_s / dear.derivative_median_s:,.0f} of its derivatives."
        )
    return said


def notices(runs: list[Run], rows: pd.DataFrame) -> list[str]:
    """What the reader must know before believing a number."""
    said = []
    for run in runs:
        if run.torn:
            said.append(run.torn.replace(str(run.path), run.path.name))
        context = run.context
        if run.end is None:
            left = [address for address in context.plan if address not in run.cells]
            some = names(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "") if left else ""
            said.append(
                f"The run {context.run} is unfinished: {len(context.plan) - len(left)} of {len(context.plan)} planned cells "
                f"are here{f', not {some}' if some else ''}; `adphys run --resume` goes on with it."
            )
    if len(strange := list(dict.fromkeys(rows[~rows.known].task))):
        said.append(
            f"{names(strange)} {'is' if len(strange) == 1 else 'are'} not in this version of the code: the rows are kept as "
            "they were recorded, the kind of reference and the axis of the figure are not known."
        )
    locks = {run.context.lock_hash for run in runs}
    if len(locks) > 1:
        said.append(f"These runs used different locked versions ({', '.join(sorted(locks))}); see the end of the page.")
    return said


def noise(rows: pd.DataFrame) -> str:
    """How far the numbers can be believed, from the numbers themselves."""
    ok = rows.loc[rows.status == "ok"]
    if ok.empty:
        return ""
    width = ((ok.derivative_q3_s - ok.derivative_q1_s) / ok.derivative_median_s).median()
    said = f"The quartiles of a derivative lie {width:.0%} of its median apart in the middle cell"
    if (several := ok.loc[ok.processes > 1].process_spread - 1).size:
        said += (
            f"; minima of two processes of one cell differ by {several.median():.0%} in the middle cell, "
            f"{several.max():.0%} in the worst"
        )
    return f"{said}; the highest load average when a process started was {ok.load1_max.max():.1f}."


def provenance(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows: what each run was, one column a run."""
    columns: list[dict[str, Any]] = []
    for run in runs:
        c, end = run.context, run.end
        machine = {key: value for key, value in c.machine.items() if value is not None}
        columns.append(
            {
                "machine": ", ".join(f"{key.replace('_gib', ' GiB')} {value}" for key, value in machine.items()),
                "machine class": c.machine_class,
                "preset": c.preset + (f", patterns {' '.join(c.patterns)}" if c.patterns else ""),
                "started (UTC)": c.started,
                "finished (UTC)": end.finished if end else "unfinished",
                "wall time": f"{end.wall_s:.0f} s, {end.measured_s / max(end.wall_s, 1e-9):.0%} of it measured"
                if end
                else "",
                "commit": (c.commit or "none") + (", with uncommitted changes" if c.dirty else ""),
                "lock hash": c.lock_hash,
                "seed of the order": str(c.seed),
                "protocol, schema": f"{c.protocol}, {c.schema_}",
                "budget": f"{c.budget_s:g} s of derivative samples in each of {number_of(c.processes, 'fresh process')}",
                "limit": f"{c.limit_s:g} s a first call",
                "lanes": f"{c.lanes}: a small cell takes samples while another is prepared and compiled; larger ones run alone"
                if c.lanes > 1
                else "1",
                "cells": f"{len(run.cells)} of {len(c.plan)} planned",
                "versions": ", ".join(f"{name} {version}" for name, version in c.versions.items()),
            }
        )
    titles = ["run", *(run.context.run for run in runs)]
    return titles, [[key, *(column[key] for column in columns)] for key in columns[0]]


def strategies(rows: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(name, sentence, reference) of those in the rows, in the order of the vocabulary."""
    used = set(rows.strategy)
    found = [(name, s.sentence, s.reference) for name, s in STRATEGIES.items() if name in used]
    return found + [
        (name, "Not a strategy of this version of the code.", "") for name in sorted(used - set(STRATEGIES))
    ]
