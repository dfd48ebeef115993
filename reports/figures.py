"""Pictures as SVG: the whole matrix at a glance, and time against size. The same rows give the same bytes.

Text stays text. INK and PAPER are put in by name, so that the HTML page can replace them by its own colours.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from backends import STRATEGIES
from harness import cells
from reports.tables import Rate, other_keys, size_title, without
from reports.words import amount, ratio, seconds

INK, FAINT, PAPER = "#1a1b1c", "#87888a", "#fefdfc"
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "adphys",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": FAINT,
    "hatch.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
}
# Told apart with and without colour vision, on white and on black; strategies differ in marker and line besides.
COLOURS = ("#d55e00", "#3b82c4", "#c66aa5", "#009e73", "#e39a00", "#56b4e9", "#8f6bd1", "#8a8d0f", "#9a6b4f", "#808080")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*", "<", ">", "h", "d", "H", "8", (4, 1, 45))
LINES = ("-", (0, (6, 2)), (0, (5, 2, 1, 2)), (0, (1, 1.5)))
SCALE = (1, 1000)  # derivative / hand adjoint: the ends of the colours


def inline(svg: str, name: str) -> str:
    """The picture as an element of a page: its own ids, the page's ink, no background, no prologue."""
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return svg.replace(INK, "currentColor").replace(PAPER, "none")


def matrix(rows: pd.DataFrame, heads: dict[str, str]) -> str:
    """Ways by tasks, one size a task; `heads` says task -> what stands below its name."""
    tasks = [task for task in heads if (rows.task == task).any()]
    middle = rows.groupby("way").derivative_over_adjoint.median()
    by_hand = set(rows[rows.strategy == "adjoint"].way)
    ways = sorted(rows.way.unique(), key=lambda w: (w not in by_hand, pd.isna(middle[w]), middle[w], w))
    wide, high, left, top, bottom = 1.2, 0.36, 0.35 + 0.085 * max(map(len, ways)), 0.75, 0.95
    width, height = max(left + wide * len(tasks) + 0.15, 6.2), top + high * len(ways) + bottom
    colours, norm = mpl.colormaps["YlGnBu"], LogNorm(*SCALE, clip=True)

    def draw(fig: Figure) -> None:
        ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # everything is placed in inches
        ax.axis("off")
        for k, task in enumerate(tasks):
            problem, _, short = task.partition(".")
            ax.text(left + wide * (k + 0.5), 0.2, problem, ha="center", va="center", size=8.5)
            ax.text(left + wide * (k + 0.5), 0.37, short, ha="center", va="center", weight="bold")
            ax.text(left + wide * (k + 0.5), 0.56, heads[task], ha="center", va="center", size=8)
        for j, way in enumerate(ways):
            weight = "bold" if way in by_hand else "normal"
            ax.text(left - 0.1, top + high * (j + 0.5), way, ha="right", va="center", weight=weight)
        for r in rows.to_dict("records"):
            if r["task"] in tasks:
                x, y = left + wide * tasks.index(r["task"]), top + high * ways.index(r["way"])
                field(ax, x, y, wide, r)
        said = "derivative time / hand adjoint time:", "hatched: not ok, and so without a time"
        ax.text(0.2, height - 0.62, said[0], va="center", size=8)
        for k, x in enumerate((1, 3, 10, 30, 100, 300, 1000)):
            swatch(ax, 2.6 + 0.48 * k, height - 0.73, 0.48, 0.22, x, f"{'≤ ' * (x == 1)}{'≥ ' * (x == 1000)}{x}")
        ax.text(0.2, height - 0.28, said[1], va="center", size=8)

    def field(ax: Axes, x: float, y: float, wide: float, r: dict) -> None:
        x, y, w, h = x + 0.02, y + 0.02, wide - 0.04, high - 0.04
        if r["status"] != "ok":
            ax.add_patch(Rectangle((x, y), w, h, facecolor="none", edgecolor=FAINT, hatch="////", lw=0.6))
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2}
            ax.text(x + w / 2, y + h / 2, r["status"], ha="center", va="center", size=8, style="italic", bbox=box)
        elif pd.isna(r["derivative_over_adjoint"]):  # nothing to compare with: the time itself
            ax.add_patch(Rectangle((x, y), w, h, facecolor="none", edgecolor=FAINT, lw=0.6))
            ax.text(x + w / 2, y + h / 2, seconds(r["derivative_median_s"]), ha="center", va="center")
        else:
            text = ratio(r["derivative_over_adjoint"])
            if r["way"] in by_hand:
                text += f"  ({seconds(r['derivative_min_s'])})"
            swatch(ax, x, y, w, h, r["derivative_over_adjoint"], text)

    def swatch(ax: Axes, x: float, y: float, w: float, h: float, value: float, text: str) -> None:
        colour = colours(norm(value))
        light = sum(s * c**2.2 for c, s in zip(to_rgb(colour), (0.2126, 0.7152, 0.0722), strict=True)) > 0.18
        ax.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor="none"))
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", color="#000000" if light else "#ffffff")

    return _svg((width, height), draw)


def scaling(rows: pd.DataFrame, rates: dict[str, Rate]) -> tuple[str, list[str]]:
    """Derivative against size of one task in one setting, and the sizes that are not on its axis; `rates` is size -> floor."""
    ok, axis = rows.loc[(rows.status == "ok") & rows.axis_value.gt(0)], rows.axis.iloc[0]
    if ok.empty:
        return "", []
    others, named = other_keys(ok), ok["size"].isin(cells.SIZES)
    on_curve = named | others.isin(others[named] if named.any() else others[:1])
    off, ok = sorted(ok.loc[~on_curve]["size"].unique()), ok.loc[on_curve]
    palette = _palette(rows)
    last = ok.sort_values("axis_value").groupby("way").tail(1).sort_values("derivative_median_s")
    where = ok.drop_duplicates("axis_value").set_index("axis_value").sort_index()["size"]
    high = max(3.2, 0.19 * (len(last) + 1))

    def draw(fig: Figure) -> None:
        ax = fig.add_axes((0.7 / 7.6, 0.5 / (high + 0.9), 4.5 / 7.6, high / (high + 0.9)))
        looks = _curves(ax, ok.sort_values("axis_value").drop_duplicates(["way", "axis_value"]), "axis_value", palette)
        ax.set(xlabel=axis)
        ax.set_title(f"{rows.task.iloc[0]}: time of the derivative, median and quartiles", loc="left", size=9, pad=12)
        floor = [(x, rates[size].seconds) for x, size in where.items() if size in rates]
        if floor:
            ax.plot(*zip(*floor, strict=True), color=FAINT, lw=1.2, linestyle="--", marker="_", markersize=12)
        low, up = ax.get_xlim() if len(where) > 1 else (where.index[0] / 2, where.index[0] * 2)
        ax.set(xlim=(low, up), ylim=ax.get_ylim())
        ax.xaxis.set_major_locator(FixedLocator([float(x) for x in where.index]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ends = [(x, y, way) for x, y, way in zip(last.axis_value, last.derivative_median_s, last.way, strict=True)]
        ends += [(*floor[-1], "bandwidth floor")] if floor else []
        _labels(ax, ends, looks, 0.18 / high)

    return _svg((7.6, high + 0.9), draw), off


def work_precision(rows: pd.DataFrame) -> str:
    """Derivative against error of one continuous task in one setting, a curve a way over at least three tolerances of the
    problem that has most of them; nothing where there are fewer."""
    ok = rows.loc[(rows.status == "ok") & rows.error.gt(0)].assign(
        rtol=rows.size_keys.str.extract(r"(?:^|,)rtol=([^,]*)", expand=False).astype(float),
        problem=without(rows, ["rtol", "atol"]),
    )
    asked = ok.groupby("problem").rtol.nunique()
    if asked.max() is pd.NA or not asked.max() >= 3:
        return ""
    ok = ok.loc[ok.problem == asked.idxmax()].sort_values("rtol").drop_duplicates(["way", "size"])
    at = str(asked.idxmax()).replace("=", " = ").replace(",", ", ")
    return _against(ok, "error", "error of the worst block", f"{rows.task.iloc[0]}: time of the derivative\n{at}")


def memory(rows: pd.DataFrame) -> str:
    """Derivative against peak memory of one task in one setting, a point a way, at the size where checkpoints save a library
    most; nothing where they save none half of its own memory."""
    ok = rows.loc[(rows.status == "ok") & rows.peak_memory_bytes.gt(0)]
    kept = (ok.strategy == "checkpoint") | ok.form.isin(("checkpoints", "binomial"))
    every = ~kept & ok.strategy.isin(("adjoint", "reverse"))
    peaks = [part.groupby(["size", "backend"]).peak_memory_bytes.min().astype(float) for part in (ok[every], ok[kept])]
    saved = (peaks[0] / peaks[1]).dropna()
    if saved.empty or saved.max() < 2:
        return ""
    ok = ok.loc[ok["size"] == saved.idxmax()[0]].sort_values("peak_memory_bytes")
    title = f"{rows.task.iloc[0]}: time of the derivative\n{size_title(ok)}"
    return _against(ok, "peak_memory_bytes", "peak memory", title, bytes_=True)


def _against(ok: pd.DataFrame, x: str, label: str, title: str, bytes_: bool = False) -> str:
    """A curve or a point a way, of rows in their order."""
    last = ok.groupby("way").tail(1).sort_values("derivative_median_s")
    high = max(3.2, 0.19 * (len(last) + 1))

    def draw(fig: Figure) -> None:
        ax = fig.add_axes((0.7 / 7.6, 0.5 / (high + 1.1), 4.5 / 7.6, high / (high + 1.1)))
        looks = _curves(ax, ok.assign(**{x: ok[x].astype(float)}), x, _palette(ok))
        ax.set(xlabel=label)
        ax.set_title(title, loc="left", size=9, pad=12)
        ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())
        if bytes_:
            ax.xaxis.set_major_locator(LogLocator(4.0, numticks=7))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: amount(x)))
        ends = [(float(x), y, way) for x, y, way in zip(last[x], last.derivative_median_s, last.way, strict=True)]
        _labels(ax, ends, looks, 0.18 / high)

    return _svg((7.6, high + 1.1), draw)


def _palette(rows: pd.DataFrame) -> dict[str, str]:
    return dict(zip(sorted({*cells.backends(), *rows.backend}), COLOURS * 9, strict=False))


def _curves(ax: Axes, ok: pd.DataFrame, x: str, palette: dict[str, str]) -> dict[str, dict]:
    """One line a way, its points in their order, and way -> how it looks; both axes logarithmic."""
    ax.set(xscale="log", yscale="log")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color=FAINT, alpha=0.3, lw=0.5)
    looks = {}
    for way, points in ok.groupby("way"):
        r = points.iloc[0]
        by_hand = r.strategy == "adjoint"
        k = list(STRATEGIES).index(r.strategy) if r.strategy in STRATEGIES else -1
        colour = INK if by_hand else palette[r.backend]
        looks[way] = {"color": colour, "marker": MARKERS[k], "markersize": 6, "lw": 2.6 if by_hand else 1.4}
        looks[way] |= {
            "linestyle": "-" if by_hand else LINES[(k - 1) % len(LINES)],
            "markerfacecolor": PAPER if "." in r.way else colour,
        }
        ax.plot(points[x], points.derivative_median_s, **looks[way], zorder=5 if by_hand else 3)
        ax.vlines(points[x], points.derivative_q1_s, points.derivative_q3_s, color=colour, lw=3, alpha=0.35)
    times, (low, up) = FuncFormatter(lambda y, _: re.sub(r"\.0+ ", " ", seconds(y))), ax.get_ylim()
    ax.yaxis.set_major_formatter(times)
    ax.yaxis.set_minor_formatter(times if up < 5 * low else NullFormatter())
    return looks


def _labels(ax: Axes, ends: list[tuple[float, float, str]], looks: dict, gap: float) -> None:
    """Each line's name at the right, in its height where there is room, with its marker and a thin line to its last point."""
    to_axes = ax.transAxes.inverted()
    spots = sorted((tuple(to_axes.transform(ax.transData.transform((x, y)))), way) for x, y, way in ends)
    spots.sort(key=lambda s: s[0][1])
    heights = _apart([y for (_, y), _ in spots], gap)
    for ((x, y), way), h in zip(spots, heights, strict=True):
        look = looks.get(way, {"color": FAINT, "marker": "_", "markersize": 12})
        thin = {"color": FAINT, "lw": 0.5, "linestyle": (0, (1, 2)), "clip_on": False, "transform": ax.transAxes}
        ax.plot([x + 0.015, 1.03, 1.05], [y, h, h], **thin)
        ax.plot([1.08], [h], clip_on=False, transform=ax.transAxes, **look)
        weight = "bold" if look["color"] == INK else "normal"
        ax.text(1.11, h, way, transform=ax.transAxes, va="center", size=8.5, weight=weight)


def _apart(heights: list[float], gap: float) -> list[float]:
    """Rising heights moved as little as a gap between neighbours asks for (isotonic regression), within the axes."""
    pools: list[tuple[float, int]] = []  # (sum, number) of heights less their share of gaps
    for k, height in enumerate(heights):
        pools.append((height - k * gap, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            (s, n), (t, m) = pools.pop(), pools.pop()
            pools.append((s + t, n + m))
    placed = [s / n for s, n in pools for _ in range(n)]
    top = 1.02 - gap * (len(heights) - 1)
    return [min(max(height, 0.0), top) + k * gap for k, height in enumerate(placed)]


def _svg(size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    with mpl.rc_context(RC):
        fig, out = Figure(figsize=size), io.StringIO()
        draw(fig)
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
