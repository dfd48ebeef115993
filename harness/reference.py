"""References: what every gradient is judged by, and how each reference was itself judged.

At tiny the whole gradient is built from the statement, entry by entry, by complex step. At every other size it is the hand
adjoint, once that has passed at tiny and agrees, at this very size, with complex step of the statement along the judge's
directions. Where there is no hand adjoint, or a wrong one, those directions judge. Nothing is judged by itself. A continuous
task says what the derivative of the solution is (`Task.exact`), and that judges all its ways at all sizes. The strategy
`implicit` is judged where a loop has converged (`Task.converged`). Inputs and references are made by workers, so that a size
too large for the memory ends a worker and not the run, and are kept by content hash in a folder that git ignores.
"""

import hashlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from backends import STRATEGIES
from harness import CACHE, ROOT, UserError, processes
from harness.cells import APPROXIMATE_OR_SLOW, Cell, backend, implementation_file, modules, outline, size_of, tasks
from harness.judge import error, loss_error
from harness.machine import lock_hash

LIMIT_S = 3600.0  # references may take long, once
failed: dict[Path, tuple[str, str]] = {}  # what could not be made is not tried again: status and sentence
DIFFERENCE_H = 1e-6


@dataclass(frozen=True)
class Reference:
    """What a worker needs to judge: the file of a whole gradient, or of directional derivatives, and what to call it."""

    judge: str
    gate: float  # of a block of the gradient
    loss_gate: float
    whole: str | None = None
    along: str | None = None


class NoReference(Exception):
    """The reference could not be computed: the status and the sentence of the process that tried."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def reference(cell: Cell) -> Reference:
    """The judge of a cell. Raises NoReference where none can be computed."""
    task, size = tasks(cell.problem)[cell.task], size_of(cell)
    if cell.strategy == "implicit":
        size = size._replace(**task.converged)  # type: ignore[attr-defined] - a NamedTuple
    loss_gate = task.gate if cell.dtype == "float64" else task.gate32
    gate = STRATEGIES[cell.strategy].gate or loss_gate
    if task.exact:
        return Reference("the derivative of the solution itself", gate, loss_gate, whole=_exact(cell, size))
    tiny = size == task.sizes["tiny"]
    by_hand = (cell.backend, cell.strategy) == ("numba", "adjoint")
    if tiny and cell.strategy not in APPROXIMATE_OR_SLOW:
        whole = _gradients(cell, [size], "numpy", "complex_step")[0]
        return Reference("complex step of the statement", gate, loss_gate, whole=whole)
    if not by_hand and _adjoint_passes(cell, size, task):
        return Reference("the hand adjoint", gate, loss_gate, whole=_gradients(cell, [size], "numba", "adjoint")[0])
    if cell.strategy == "complex_step":
        gate = STRATEGIES["difference"].gate or gate
        return Reference(
            "central differences of the statement", gate, loss_gate, along=_directions(cell, size, DIFFERENCE_H)
        )
    return Reference("complex step of the statement along directions", gate, loss_gate, along=_directions(cell, size))


def inputs(cell: Cell, size: tuple) -> str:
    """The file that holds theta and data of this task and size."""
    path = _path("inputs", cell, size, "")
    spec = _spec(cell) | {"size": size._asdict(), "save": str(path)}  # type: ignore[attr-defined] - a NamedTuple
    _compute("inputs", spec, {}, [path])
    return str(path)


def entries(cell: Cell) -> dict[str, int]:
    """Of each block of theta. Only the headers are read: the arrays may fill the memory."""
    found = {}
    with ZipFile(inputs(cell, size_of(cell))) as arrays:
        for member in arrays.namelist():
            if member.startswith("theta "):
                with arrays.open(member) as file:
                    np.lib.format.read_magic(file)
                    shape, _, _ = np.lib.format.read_array_header_1_0(file)
                found[member.removeprefix("theta ").removesuffix(".npy")] = prod(shape)
    return found


def _adjoint_passes(cell: Cell, size: tuple, task) -> bool:
    """Whether there is a hand adjoint that is right at tiny, entry by entry, and at this size, along directions."""
    form = outline(cell.problem, "numba").get(cell.task, {})
    if not any("adjoint" in f.strategies for f in form.values()):
        return False
    tiny = task.sizes["tiny"]
    try:
        # both sizes in one worker, which compiles once
        at_tiny, here = _gradients(cell, [tiny, size], "numba", "adjoint")
        if not _agrees(at_tiny, _gradients(cell, [tiny], "numpy", "complex_step")[0], inputs(cell, tiny), task.gate):
            return False
        return size == tiny or _agrees(here, _directions(cell, size), inputs(cell, size), task.gate)
    except NoReference:
        return False


def _agrees(gradient: str, other: str, at: str, gate: float) -> bool:
    """Whether every block and the loss of a saved gradient are within the gate of a reference, whole or directional."""
    with np.load(gradient) as got, np.load(other) as want, np.load(at) as arrays:
        blocks = {name.removeprefix("block "): got[name] for name in got.files if name.startswith("block ")}
        off = [error(g, want.get(f"block {name}"), want.get(f"along {name}"), name) for name, g in blocks.items()]
        theta = {name: arrays[f"theta {name}"] for name in blocks}
        return max(*off, loss_error(float(got["loss"]), float(want["loss"]), theta, blocks)) <= gate


def _gradients(cell: Cell, sizes: list[tuple], library: str, strategy: str) -> list[str]:
    """A file a size."""
    paths = [_path(f"{library}-{strategy}", cell, size, library) for size in sizes]
    form = next(
        f
        for f, o in outline(cell.problem, library)[cell.task].items()
        if library == "numpy" or strategy in o.strategies
    )
    jobs = [
        {**_at(cell, size), "save": str(path)} for size, path in zip(sizes, paths, strict=True) if not path.exists()
    ]
    spec = _spec(cell) | {"backend": library, "strategy": strategy, "form": form, "sizes": jobs}
    spec["code"] = str(code_folder(cell, library))
    _compute("gradient", spec, backend(library).environ(1), paths)
    return [str(path) for path in paths]


def _exact(cell: Cell, size: tuple) -> str:
    path = _path("exact", cell, size, "")
    _compute("exact", _spec(cell) | _at(cell, size) | {"save": str(path)}, {}, [path])
    return str(path)


def _directions(cell: Cell, size: tuple, h: float | None = None) -> str:
    path = _path(f"along-{h}", cell, size, "numpy")
    _compute("directions", _spec(cell) | _at(cell, size) | {"save": str(path), "h": h}, {}, [path])
    return str(path)


def _compute(mode: str, spec: dict, environ: dict[str, str], paths: list[Path]) -> None:
    """The files that are not there yet, by one worker. What was ended for the sake of those beside it may be tried again."""
    absent = [path for path in paths if not path.exists()]
    for path in absent:
        if path in failed:
            raise NoReference(*failed[path])
    if not absent:
        return
    result = processes.run(mode, spec | {"cpus": processes.everywhere()}, environ, 1, LIMIT_S)
    if result["status"] != "ok":
        what = "inputs cannot be made" if mode == "inputs" else "reference could not be computed"
        why = result["status"], f"Its {what}: {result['reason']}"
        if not result.get("crowded"):
            failed.update(dict.fromkeys((path for path in paths if not path.exists()), why))
        raise NoReference(*why)


def _spec(cell: Cell) -> dict:
    """References are float64, always."""
    return {"problem": cell.problem, "task": cell.task, "dtype": "float64", "device": "cpu"}


def _at(cell: Cell, size: tuple) -> dict:
    return {"size": size._asdict(), "inputs": inputs(cell, size)}  # type: ignore[attr-defined] - a NamedTuple


def _path(kind: str, cell: Cell, size: tuple, library: str) -> Path:
    """Named by content: the statement, the code that computes it, the lock, the task and the size."""
    own = repr((_content(cell.problem, library), cell.task, tuple(size)))
    for file in ("judge.py", "cell_protocol.py"):
        own += (ROOT / "harness" / file).read_text()
    digest = hashlib.sha256(own.encode()).hexdigest()
    return cache_folder() / f"{cell.problem}.{cell.task}-{kind}-{digest[:20]}.npz"


def code_folder(cell: Cell, library: str) -> Path:
    """Where a library may keep what it compiled for a task, named by content too. One a task, because tasks are compiled side
    by side."""
    return cache_folder() / f"{cell.name}-{library}-{_content(cell.problem, library)[:20]}"


def _content(problem: str, library: str) -> str:
    """A digest of all that a library runs of a problem."""
    digest = hashlib.sha256(lock_hash().encode())
    files = ROOT / "problems/__init__.py", modules("problems")[problem], *_library_files(problem, library)
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _library_files(problem: str, library: str) -> list[Path]:
    own = ROOT / "backends" / f"{library}_backend.py", implementation_file(problem, library)
    files = [*own, ROOT / "backends/numba_math.py"]
    return [f for f in files if library and f.is_file()]


def cache_folder() -> Path:
    """`.cache` beside the code, or ADPHYS_CACHE."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"The folder {CACHE} for references cannot be written ({e.strerror}); set ADPHYS_CACHE."
        ) from None
    return CACHE
