"""The physics: one package (or one file) a problem, the statement first, then every backend's idiomatic way of writing it.

A statement (`problems/<problem>/__init__.py`) imports NumPy and SciPy alone and ends with `TASKS = {name: Task(...)}`.
An implementation (`problems/<problem>/<problem>_<backend>.py`) ends with
`IMPLEMENTATION = {task: {form: Implementation(...)}}`, the natural form first. Both literals are also read without
importing anything (harness/cells.py), so their keys are plain strings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, Any]
GOLDEN = 0.6180339887498949


def gold(n: int, k0: int = 1) -> np.ndarray:
    """n deterministic numbers in [-0.5, 0.5), float64, the same bits in every framework: ((k0 + i) * golden) % 1 - 0.5."""
    return ((k0 + np.arange(n)) * GOLDEN) % 1.0 - 0.5


def seconds(f: Callable[[], Any]) -> float:
    """What a call of f takes, the quickest of five: a part of a gradient, for `stats`."""
    taken = []
    for _ in range(5):
        began = perf_counter()
        f()
        taken.append(perf_counter() - began)
    return min(taken)


def whole(a: float, b: float) -> int | None:
    """a / b as an integer where it is one to rounding, else None. Steps are counted in integers, never by adding times."""
    n = round(a / b)
    return n if n >= 1 and abs(n * b - a) <= 1e-9 * abs(a) else None


class BadSize(ValueError):
    """A size that the task cannot have: one sentence, with what to give instead."""


class Diverged(ArithmeticError):
    """A solver did not get there: one sentence, with what to give instead. Its cell has the status `diverged`."""


class Published(NamedTuple):
    """What others printed of the same problem, to stand beside what is measured here."""

    source: str  # where, and on which machine
    keys: Mapping[str, float]  # of the sizes that stand beside it, but for the axis
    seconds: Mapping[str, Mapping[float, float]]  # method -> place on the axis -> seconds a gradient
    error: Mapping[str, float]  # method -> relative error over all entries, at the largest place
    differs: str  # what is not the same, as a sentence


@dataclass(frozen=True)
class Task:
    """One thing to differentiate.

    `forms` are the statement itself in NumPy: `array` first, then `inplace` and `loops` where the task has them, each
    `loss(theta, data, size) -> scalar`, equal to 1e-13. `inputs(size)` returns (theta, data), dicts of float64 arrays
    (index arrays are int64). `size` is a NamedTuple class of static numbers, `sizes` its named members. A continuous task
    has `exact(theta, data, size) -> (loss, {block: gradient})`, the solution's own derivative, by which all are judged.
    """

    size: type
    sizes: Mapping[str, Any]
    inputs: Callable[[Any], tuple[Arrays, Arrays]]
    forms: Mapping[str, Callable]
    gate: float  # largest relative 2-norm error of a block's gradient in float64
    gate32: float  # the same in float32: 20 times what was measured (catalogue, section 0)
    lower: Mapping[str, int] = field(default_factory=dict)  # least value of an integer key, 1 where unnamed
    check: Callable[[Any], str] = lambda size: ""  # what is wrong with a size, as a sentence, or nothing
    axis: str = "N"  # the size key on the horizontal axis of figures
    sweep: tuple[dict[str, float], ...] = ()  # further sizes of the full preset, for the figure of time against size
    floor: str = ""  # the block whose triad a = b + s c is the bandwidth floor, where one is asked for
    asks: str = "gradient"  # or jvp, hvp, jacobian
    reference: str = "discrete"  # or continuous: never both in one table
    exact: Callable | None = None  # of a continuous task
    tolerances: tuple[dict[str, float], ...] = ()  # sizes of the full preset that differ in how far a solver goes
    published: Published | None = None
    # the size's keys where a loop ends at its root, by which `implicit` is judged
    converged: Mapping[str, float] = field(default_factory=dict)

    def at(self, /, **keys: str | float) -> Any:
        """The size with these keys. Raises BadSize with one sentence: unknown key, missing key, not a number, too small."""
        fields = self.size.__annotations__
        for key in keys:
            if key not in fields:
                raise BadSize(f"there is no size key {key!r} here; the keys are {', '.join(fields)}")
        for key in fields:
            if key not in keys and key not in self.size._field_defaults:
                raise BadSize(
                    f"the size key {key} has no default; give it, as in {key}={self.sizes['small']._asdict()[key]}"
                )
        values = {key: _number(key, value, fields[key]) for key, value in keys.items()}
        size = self.size(**values)
        for key, kind in fields.items():
            value = getattr(size, key)
            least = self.lower.get(key, 1)
            if kind is int and value < least:
                raise BadSize(f"{key}={value} is too small; the least {key} is {least}")
        if wrong := self.check(size):
            raise BadSize(wrong)
        return size


@dataclass(frozen=True)
class Implementation:
    """One form of one task in one backend.

    `loss(theta, data, size)` is the primal, or `loss(theta, data, size, work)` where there is `prepare(structure, size)
    -> work`: buffers, CSR pattern, colouring. `structure` maps every name of theta and data to the array itself where it
    holds integers and to its `Shape` where it holds numbers. `strategies` holds what a strategy needs beyond the primal,
    with the same arguments: {"adjoint": gradient}, {"checkpoint": loss}. `unsupported` holds the author's sentence for a
    strategy that cannot work; the code stays, and a test runs the attempt. `stats(theta, data, size) -> dict` is untimed.
    """

    loss: Callable
    prepare: Callable | None = None
    stats: Callable | None = None
    strategies: Mapping[str, Callable] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)


class Shape(NamedTuple):
    """What `prepare` may know of an array of numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype


def structure(theta: Arrays, data: Arrays) -> dict[str, Any]:
    """What `prepare` sees of the inputs: integer arrays whole, of all others the shape and the dtype."""
    arrays = {name: np.asarray(value) for name, value in (theta | data).items()}
    return {name: a if a.dtype.kind in "iu" else Shape(a.shape, a.dtype) for name, a in arrays.items()}


def _number(key: str, text: str | float, kind: type) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadSize(f"{key}={text} is not a number") from None
    if not isfinite(value) or (kind is int and value != int(value)):
        raise BadSize(f"{key}={text} is not {'a whole' if kind is int else 'a finite'} number")
    return kind(value)
