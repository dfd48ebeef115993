"""Cells: problems x backends x strategies at a size, and how they are addressed.

An address is `problem.task/backend.form/strategy@size`; the natural form goes unnamed. What exists is read from the two
folders: a problem is a file, a backend is a file, no list is edited anywhere. Implementations are read as syntax trees,
never imported here, so listing needs no library and a missing one keeps its rows.
"""

import ast
import difflib
import importlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from backends import STRATEGIES, Backend
from harness import ROOT, UserError
from harness.environments import installed, is_made
from problems import BadSize, Task

SIZES = ("tiny", "small", "large")
DTYPES = ("float64", "float32")
RESERVED = {"device": "cpu", "dtype": "float64", "threads": "1"}
BY_HAND = {  # strategies that an implementation must write a function for
    "adjoint": "Nobody wrote the adjoint of {name} by hand yet: add it to {where}.",
    "duals": "Nobody wrote {name} over dual numbers yet: add it to {where}.",
    "custom_rule": "Nobody gave {name} a rule of its own here: where it has a solve, an FFT or a fixed point, add it to {where}.",
    "implicit": "Nobody differentiated {name} by the implicit function theorem here: where it has a root, add it to {where}.",
    "backsolve": "Nobody integrated {name} backwards here: where it is a differential equation, add its adjoint to {where}.",
    "interpolating": "Nobody integrated an adjoint of {name} here: where it is a differential equation, add it to {where}.",
    "quadrature": "Nobody integrated a gradient of {name} here: where it is a differential equation, add it to {where}.",
    "sensitivity": "Nobody integrated tangents of {name} here: where it is a differential equation, add them to {where}.",
}
APPROXIMATE_OR_SLOW = ("complex_step", "difference")  # an entry at a time: cells at tiny and small only


@dataclass(frozen=True)
class Form:
    """What an implementation file says of one form of a task, read from its syntax tree."""

    names: tuple[str, ...] = ()  # the functions that it names
    strategies: dict[str, tuple[str, ...]] = field(default_factory=dict)  # strategies with a function of their own
    unsupported: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    problem: str
    task: str
    backend: str
    form: str  # "" where nobody wrote one
    natural: bool
    strategy: str
    size: str  # tiny, small, large or the user's keys: N=64,alpha=0.1
    device: str = "cpu"
    dtype: str = "float64"
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.problem}.{self.task}"

    @property
    def way(self) -> str:
        return f"{self.backend}{'' if self.natural else '.' + self.form}/{self.strategy}"

    @property
    def address(self) -> str:
        extra = "".join(
            f",{key}={value}" for key, default in RESERVED.items() if (value := str(getattr(self, key))) != default
        )
        return f"{self.name}/{self.way}@{self.size}{extra}"


# What there is


def modules(folder: str) -> dict[str, Path]:
    """Name -> file of every module or package in a top-level folder."""
    found = {}
    for path in sorted((ROOT / folder).iterdir()):
        if path.suffix == ".py" and path.stem != "__init__":
            found[path.stem] = path
        elif (path / "__init__.py").is_file():
            found[path.name] = path / "__init__.py"
    return found


def problems() -> tuple[str, ...]:
    return tuple(modules("problems"))


def backends() -> tuple[str, ...]:
    return tuple(name.removesuffix("_backend") for name in modules("backends") if name.endswith("_backend"))


@cache
def tasks(problem: str) -> dict[str, Task]:
    return _load("problems", problem, "TASKS")


@cache
def backend(name: str) -> type[Backend]:
    return _load("backends", f"{name}_backend", "BACKEND")


def task(name: str) -> Task:
    """The task of `problem.task`. Raises UserError where there is none."""
    problem, _, short = name.partition(".")
    if problem in problems() and short in tasks(problem):
        return tasks(problem)[short]
    known = [f"{p}.{t}" for p in problems() for t in tasks(p)]
    raise UserError(f"There is no task {name!r}; {_nearest(name, known)}.")


def implementation_file(problem: str, backend_name: str) -> Path:
    return ROOT / "problems" / problem / f"{problem}_{backend_name}.py"


@cache
def outline(problem: str, backend_name: str) -> dict[str, dict[str, Form]]:
    """Task -> form -> Form, natural form first, of an implementation file; of the statement for NumPy, which runs it."""
    if backend_name == "numpy":
        return {
            name: {next(iter(t.forms)): Form((next(iter(t.forms.values())).__name__,))}
            for name, t in tasks(problem).items()
        }
    path = implementation_file(problem, backend_name)
    if not path.is_file():
        return {}
    tree = parse(path)
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "IMPLEMENTATION":
            try:
                return {t.value: {f.value: _form(v) for f, v in _items(forms)} for t, forms in _items(node.value)}
            except (AttributeError, ValueError):
                break
    raise UserError(
        f"{path.relative_to(ROOT)} does not end with IMPLEMENTATION = {{task: {{form: Implementation(...)}}}} "
        "with plain strings as keys and sentences; write it so, because it is read without importing the library."
    )


def parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text())
    except (SyntaxError, ValueError) as e:
        raise UserError(f"{path.relative_to(ROOT)} is broken: {e}; mend it or remove the file.") from None


def _items(node: Any) -> list[tuple[Any, Any]]:
    return list(zip(node.keys, node.values, strict=True))


def _form(node: Any) -> Form:
    """Of `Implementation(loss, prepare, strategies={...}, unsupported={...})`."""
    keywords = {k.arg: k.value for k in node.keywords}
    strategies = {k.value: _names(v) for k, v in _items(keywords["strategies"])} if "strategies" in keywords else {}
    unsupported = ast.literal_eval(keywords["unsupported"]) if "unsupported" in keywords else {}
    plain = [*node.args, *(value for key, value in keywords.items() if key in ("loss", "prepare"))]
    return Form(tuple(n for value in plain for n in _names(value)), strategies, unsupported)


def _names(node: ast.AST) -> tuple[str, ...]:
    return tuple(n.id for n in ast.walk(node) if isinstance(n, ast.Name))


def _load(folder: str, module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(f"{folder}.{module}"), attribute)
    except Exception as e:  # whatever a file written by a user does when it is imported
        raise UserError(
            f"{modules(folder)[module].relative_to(ROOT)} cannot be used: {type(e).__name__}: {' '.join(str(e).split())}; "
            "mend it or remove it."
        ) from None


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {near[0]}? There are {', '.join(known)}" if near else f"there are {', '.join(known)}"


# What is asked for


def cells(pattern: str = "*") -> Iterator[Cell]:
    """All cells that match: fnmatch over addresses, `*` crosses `/`, missing parts match all, `@N=64` is a size.

    Raises UserError where nothing matches or the size is not one of the task's.
    """
    left, _, right = pattern.partition("@")
    left = left or "*"
    if "=" in right:
        sizes, reserved = _own_size(right)
    else:
        sizes, reserved = [s for s in SIZES if fnmatchcase(s, right or "*")], {}
    empty = True
    refused = ""
    for cell in _ways(left):
        if not any(fnmatchcase(f"{cell.name}/{cell.way}", left + end) for end in ("", "/*", ".*")):
            continue
        for size in sizes:
            if size == "large" and cell.strategy in APPROXIMATE_OR_SLOW:
                continue
            found = replace(cell, size=size, **reserved)
            try:
                size_of(found)
            except UserError as e:
                refused = str(e)
                continue
            empty = False
            yield found
    if empty:
        raise UserError(refused or f"No cell matches {pattern!r}; {_why_no_match(left, right)}.")


def cell(address: str) -> Cell:
    """The one cell of an address. Raises UserError with the part that is wrong."""
    left, at, size = address.partition("@")
    parts = left.split("/")
    if len(parts) != 3 or not at or not size or "*" in address:
        raise UserError(
            f"{address!r} is not the address of one cell; write problem.task/backend/strategy@size, "
            "as in brusselator.rhs/jax/reverse@small or ...@N=64."
        )
    if "=" not in size and size not in SIZES:
        raise UserError(f"There is no size {size!r}; sizes are {', '.join(SIZES)}, or your own keys, as in @N=64.")
    if "=" in size and len(_own_size(size)[0]) > 1:
        raise UserError(f"{address!r} names no size; write it before the comma, as in @small,{size}.")
    task(parts[0])
    if size == "large" and parts[2] in APPROXIMATE_OR_SLOW:
        raise UserError(
            f"{parts[2]} takes one primal and more for every entry of theta, so it has no cell at large; use small."
        )
    exact = [c for c in cells(f"{parts[0]}/{parts[1]}@{size}") if f"{c.name}/{c.way}" == left]
    if exact:
        return exact[0]
    raise UserError(f"There is no cell {address!r}; {_why_no_match(left, size)}.")


def size_of(cell: Cell) -> Any:
    """The NamedTuple of static numbers. Raises UserError: which key of which task is wrong, and what to give."""
    t = tasks(cell.problem)[cell.task]
    if cell.size in t.sizes:
        return t.sizes[cell.size]
    if "=" not in cell.size:
        raise UserError(f"{cell.name} has no size {cell.size!r}; it has {', '.join(t.sizes)}.")
    try:
        return t.at(**dict(item.split("=", 1) for item in cell.size.split(",")))
    except BadSize as e:
        raise UserError(f"{cell.name} cannot have the size {cell.size}: {e}.") from None


def form_of(cell: Cell) -> Form:
    """What its author wrote; nothing where nobody did."""
    return outline(cell.problem, cell.backend).get(cell.task, {}).get(cell.form, Form())


def main_strategy(cell: Cell) -> str:
    """The first of the library's strategies that this form has; the first of all where it has none."""
    form, every = form_of(cell), backend(cell.backend).strategies()
    has = (s for s in every if s not in form.unsupported and (s not in BY_HAND or s in form.strategies))
    first = next(has, every[0])
    return every[0] if first in APPROXIMATE_OR_SLOW else first


def known_status(cell: Cell) -> tuple[str, str]:
    """(status, sentence) where they are known without running, else ("", "")."""
    where = implementation_file(cell.problem, cell.backend).relative_to(ROOT)
    if not cell.form:
        return "missing", f"Nobody wrote {cell.name} for {cell.backend} yet: add it to {where}."
    form = form_of(cell)
    if cell.strategy in form.unsupported:
        return "unsupported", form.unsupported[cell.strategy]
    if cell.strategy in BY_HAND and cell.strategy not in form.strategies:
        return "missing", BY_HAND[cell.strategy].format(name=cell.name, where=where)
    library = backend(cell.backend)
    if cell.device not in library.devices:
        return (
            "unavailable",
            f"{cell.backend} runs on {' and '.join(library.devices)} only; leave out device={cell.device}.",
        )
    if not is_made(library):
        return (
            "unavailable",
            f"The environment {library.env}, in which {cell.backend} runs, is not made or not up to date; "
            f"make it with adphys env create {library.env}.",
        )
    for name in library.requires:
        if not installed(name, library):
            return (
                "unavailable",
                f"The library {name} is not installed; install it with pip install {name} -c constraints.txt."
                if library.env == "main"
                else f"The library {name} is not in the environment {library.env}; add it to the pins of {cell.backend}.",
            )
    programs = library.programs.get(cell.strategy, ())
    if programs and not any(map(shutil.which, programs)):
        return "unavailable", f"{cell.backend}/{cell.strategy} needs a compiler ({' or '.join(programs)}); install one."
    return "", ""


def _ways(left: str) -> Iterator[Cell]:
    """Every way at no size yet; of a pattern whose first parts are plain names, only those that can match are read."""
    want, library_wanted = (part if not set(part) & set("*?[") else "" for part in [*left.split("/"), ""][:2])
    for problem in problems():
        if want and want.partition(".")[0] != problem:
            continue
        for name in tasks(problem):
            if want and want not in (problem, f"{problem}.{name}"):
                continue
            for library in backends():
                if want and library_wanted and library_wanted.partition(".")[0] != library:
                    continue
                forms = outline(problem, library).get(name) or {"": Form()}
                for k, form in enumerate(forms):
                    for strategy in backend(library).strategies():
                        yield Cell(problem, name, library, form, k == 0, strategy, "")


def _own_size(text: str) -> tuple[list[str], dict[str, Any]]:
    """Split `small,threads=2` or `N=64,alpha=0.1,dtype=float32` into the size and the reserved keys."""
    keys, reserved = [], {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if key in RESERVED and equals:
            reserved[key] = value
        elif (equals and value) or item in SIZES:
            keys.append(item)
        else:
            raise UserError(f"{item!r} in the size {text!r} is not key=value; write it as in N=64,alpha=0.1.")
    names = [key.partition("=")[0] for key in keys]
    if len(set(names)) < len(names) or (len(names) > 1 and set(names) & set(SIZES)):
        raise UserError(
            f"The size {text!r} says one thing twice; give a named size or each key once, as in N=64,alpha=0.1."
        )
    if reserved.get("dtype", "float64") not in DTYPES:
        raise UserError(f"dtype={reserved['dtype']} is not known; dtypes are {', '.join(DTYPES)}.")
    if reserved.get("device", "cpu") not in ("cpu", "cuda"):
        raise UserError(f"device={reserved['device']} is not known; devices are cpu, cuda.")
    if "threads" in reserved:
        if not reserved["threads"].isdigit() or int(reserved["threads"]) < 1:
            raise UserError(f"threads={reserved['threads']} is not a whole number of at least 1.")
        reserved["threads"] = int(reserved["threads"])
    return ([",".join(keys)] if keys else list(SIZES)), reserved


def _why_no_match(left: str, size: str) -> str:
    name, _, rest = left.partition("/")
    library, _, strategy = rest.partition("/")
    library = library.partition(".")[0]
    names = [f"{p}.{t}" for p in problems() for t in tasks(p)]
    if not any(fnmatchcase(n, name + end) for n in names for end in ("", ".*")):
        return f"there is no task {name!r}, {_nearest(name, names)}"
    if library and not any(fnmatchcase(b, library) for b in backends()):
        return f"there is no backend {library!r}, {_nearest(library, backends())}"
    if strategy and not any(fnmatchcase(s, strategy) for s in STRATEGIES):
        return f"there is no strategy {strategy!r}, {_nearest(strategy, STRATEGIES)}"
    return "see `adphys list` for what there is"
