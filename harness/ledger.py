"""The ledger: append-only JSON lines, one a finished cell, flushed to the disk at once. The only truth.

A run is one file, `results/ledger/<machine-class>/<run-id>.jsonl`: a context record first, floors and cells as they end,
an end record last; results/README.md has the schema. Nothing else may be trusted: every record is validated when it is
written and when it is read. A torn last line (kill -9, full disk) is tolerated and reported; any other unreadable line is
an error that names the line.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from harness import ROOT, UserError
from harness.machine import machine_class

SCHEMA = 1
FOLDER = ROOT / "results" / "ledger"

Status = Literal[
    "ok", "unsupported", "missing", "unavailable", "wrong", "diverged", "invalid", "timeout", "oom", "crashed", "error"
]
DECLARED = ("ok", "unsupported", "missing", "unavailable", "timeout")  # what a sound run may end with


class Record(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)  # readers ignore unknown fields; strict JSON


class Block(Record):
    """One block of the gradient."""

    size: int = Field(description="entries")
    norm: float | None = Field(description="2-norm")
    dot_gold5: float | None = Field(description="inner product of the flattened gradient with gold(size, 5)")
    error: float | None = Field(description="relative 2-norm error against the reference; null where not finite")
    reference_norm: float | None = Field(description="2-norm of the reference (estimated where it is directional)")
    reference_nonzero: float | None = Field(description="share of the reference's entries that are not zero")


class Samples(Record):
    """Raw samples of one call in one process."""

    number: int = Field(description="calls in a sample")
    wall: list[float] = Field(description="seconds a call, one a sample, in order")
    cpu: list[float] = Field(description="CPU seconds a call of the same samples")
    reference: list[float] = Field(description="seconds of the reference kernel beside each sample")


class Memory(Record):
    """Of one call, in a pass of its own."""

    peak: int | None = Field(
        description="bytes: high-water mark minus resident set before the call; null if not measurable"
    )
    work: int = Field(description="bytes of the arrays that `prepare` allocated")
    device: int | None = Field(description="bytes: peak of the framework's allocator on the device")


class Process(Record):
    """What one fresh worker process measured."""

    first_call_s: float = Field(description="first call of the derivative: prepare, trace, compile, run")
    derivative: Samples
    primal_first_call_s: float = Field(
        description="first call of the primal, in the process where the derivative was compiled"
    )
    primal: Samples
    memory: Memory
    stats: dict[str, float] | None = Field(None, description="of the solver: steps, RHS calls, linear solves")
    load1: float = Field(description="load average when the process started")
    steal_ticks: int | None = Field(description="ticks stolen by the host while it ran")


class CellRecord(Record):
    """One cell."""

    kind: Literal["cell"] = "cell"
    key: str = Field(
        description="hash of problem folder, backend file, harness, lock, machine class, address, protocol"
    )
    cell: str = Field(description="address")
    problem: str
    task: str
    backend: str
    form: str = Field(description="how the code is written; empty where nobody wrote it")
    strategy: str
    way: str = Field(description="backend.form/strategy, the natural form unnamed")
    size: str = Field(description="tiny, small, large or the user's keys")
    size_keys: dict[str, float] = Field(description="every size key with its value")
    device: str
    dtype: str
    threads: int
    env: str = Field("main", description="the environment whose interpreter ran the workers, named by the backend")
    status: Status
    reason: str = Field(description="a sentence where the status is not ok, else empty")
    loss: float | None = None
    loss_error: float | None = Field(
        None, description="relative to |loss| + sum |theta_i g_i|, the scale rounding theta moves"
    )
    blocks: dict[str, Block] | None = None
    error: float | None = Field(None, description="the worst block's")
    gate: float | None = Field(None, description="what error was compared with")
    judge: str | None = Field(None, description="what the gradient was judged by")
    lines: int | None = Field(None, description="lines of code of the way")
    changed: int | None = Field(
        None, description="of these, lines that the nearest form of the statement does not have"
    )
    processes: list[Process] = Field([], description="empty unless the status is ok")
    versions: dict[str, str] = Field({}, description="exact versions of the backend's libraries")
    environ: dict[str, str] = Field({}, description="environment variables set for the worker")
    cpus: list[int] = Field([], description="processors the worker was pinned to")
    commit: str | None = None
    dirty: bool | None = Field(None, description="whether problems, backends, harness or lock differed from the commit")
    finished: str = Field(description="UTC, ISO 8601")
    wall_s: float = Field(description="of the whole cell, start-up and references included")
    measured_s: float = Field(description="the part of wall_s inside first calls and samples")


class AsIs(Record):
    """What came of giving a library a form of the statement unmodified, its own NumPy in the place of NumPy."""

    kind: Literal["as_is"] = "as_is"
    key: str = Field(description="as that of a cell")
    problem: str
    task: str
    backend: str
    form: str = Field(description="of the statement: array, inplace, loops")
    strategy: str
    size: str
    status: Status = Field(description="ok: it runs as is; wrong: silently wrong; else it was refused")
    reason: str = Field(description="the error that it was refused with, or what is wrong")
    error: float | None = Field(None, description="of the gradient, where there was one: the worst block's")
    commit: str | None
    dirty: bool | None
    finished: str


class Floor(Record):
    """The bandwidth floor of a task at a size: a = b + s c in Numba over arrays of its largest block."""

    kind: Literal["floor"] = "floor"
    problem: str
    task: str
    size: str
    bytes: int = Field(description="of one of the three arrays")
    triad: Samples
    copy_: Samples = Field(alias="copy", description="np.copyto over arrays of the same size, same process")
    finished: str


class Context(Record):
    """What the whole run shares. Opens the file."""

    kind: Literal["context"] = "context"
    schema_: int = Field(SCHEMA, alias="schema")
    run: str = Field(description="run id: UTC time and preset")
    preset: str
    patterns: list[str]
    protocol: int
    seed: int = Field(description="of the order in which cells are visited")
    plan: list[str] = Field(description="addresses, in that order")
    budget_s: float = Field(description="seconds of samples of a derivative, in each process")
    processes: int = Field(description="fresh processes a cell")
    limit_s: float = Field(description="a first call that takes longer is a timeout")
    lanes: int = Field(1, description="small cells side by side, of which one at a time takes samples")
    machine: dict[str, str | int | None]
    machine_class: str
    lock_hash: str
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    started: str


class End(Record):
    """Closes the file of a run that finished; where it is absent, `--resume` goes on."""

    kind: Literal["end"] = "end"
    finished: str
    wall_s: float = Field(description="of this run, resumed parts added up")
    measured_s: float


Line = Context | CellRecord | AsIs | Floor | End
RECORD: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def invalid(e: ValidationError) -> str:
    """Where the first fault is, and what."""
    first = e.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


class Run:
    """The records of one run's file, as read."""

    def __init__(self, path: Path):
        self.path = path
        self.torn = ""  # the sentence about a torn last line
        context = None
        self.end: End | None = None
        self.cells: dict[str, CellRecord] = {}  # address -> the last record
        self.as_is: list[AsIs] = []
        self.floors: list[Floor] = []
        for record in self._records():
            if isinstance(record, Context):
                context = record
            elif isinstance(record, CellRecord):
                self.cells[record.cell] = record
            elif isinstance(record, AsIs):
                self.as_is.append(record)
            elif isinstance(record, Floor):
                self.floors.append(record)
            else:
                self.end = record
        if context is None:
            raise UserError(
                f"{path} is not a ledger: it does not start with a context record; give a file that adphys run wrote."
            )
        self.context: Context = context

    def _records(self) -> Iterator[Line]:
        try:
            lines = self.path.read_bytes().split(b"\n")  # bytes: a torn line may end within a character
        except OSError as e:
            raise UserError(
                f"The ledger {self.path} cannot be read: {e.strerror}; name one that adphys run wrote."
            ) from None
        for k, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                yield RECORD.validate_json(line)
            except ValidationError as e:
                if k == len(lines):  # only a line without its newline can have been torn
                    self.torn = f"The last line of {self.path} is torn and was left out; everything before it counts."
                    return
                raise UserError(
                    f"Line {k} of the ledger {self.path} is not a valid record ({invalid(e)}); "
                    "restore the file or remove the line."
                ) from None


class Writer:
    """Appends to one run's file; every line is on the disk when `append` returns. A new run has a file of its own, whose
    name has a number where another run began in the same second."""

    def __init__(self, run: str, folder: Path | None = None, new: bool = False):
        folder = (folder or FOLDER) / machine_class()
        self.path = folder / f"{run}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if new:
                self.path = _make(folder, run)
            self._end_torn_line()
            self.file = self.path.open("a")
        except OSError as e:
            raise UserError(
                f"The ledger {self.path} cannot be written: {e.strerror}; make {folder} writable."
            ) from None

    def append(self, record: Line) -> None:
        try:
            self.file.write(record.model_dump_json(by_alias=True) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as e:
            raise UserError(
                f"The ledger {self.path} cannot be written: {e.strerror}; free space and use --resume."
            ) from None

    def _end_torn_line(self) -> None:
        """Cut a torn last line off, so that the next record starts a line of its own. One that lacks only its end stays."""
        if self.path.exists() and (data := self.path.read_bytes()) and not data.endswith(b"\n"):
            start = data.rfind(b"\n") + 1
            with self.path.open("r+b") as f:
                try:
                    RECORD.validate_json(data[start:])
                    f.seek(0, os.SEEK_END)
                    f.write(b"\n")
                except ValidationError:
                    f.truncate(start)


def _make(folder: Path, run: str) -> Path:
    """A file that was not there."""
    path, k = folder / f"{run}.jsonl", 1
    while True:
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            k += 1
            path = folder / f"{run}-{k}.jsonl"


def runs(folder: Path | None = None) -> list[Path]:
    """The run files of this machine class, the newest last."""
    return _begun(((folder or FOLDER) / machine_class()).glob("*.jsonl"))


def _begun(paths: Iterable[Path]) -> list[Path]:
    """In the order in which they began, without those that were killed before their context record was on the disk."""
    return [path for path in sorted(paths, key=lambda path: (path.parent, path.stem)) if _has_line(path)]


def _has_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.readline().endswith(b"\n")
    except OSError:  # which Run says in its sentence
        return True


def read(paths: Iterable[Path]) -> list[Run]:
    """Runs of the named files, and of all the files below named folders. Raises UserError with one sentence."""
    found = []
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no ledger {path}; run `adphys run` first, or name one with --ledger.")
        found += _begun(path.rglob("*.jsonl")) if path.is_dir() else [path]
    return [Run(path) for path in found]


def schema() -> str:
    """The published JSON schema of a line."""
    return json.dumps(RECORD.json_schema(by_alias=True), indent=1)


def readme() -> str:
    """results/README.md: `python -m harness.ledger > results/README.md`."""
    text = ["# Results", __doc__, _MORE.format(schema=SCHEMA)]
    for model in (Context, CellRecord, Process, Samples, Memory, Block, AsIs, Floor, End):
        rows = "\n".join(_row(f.alias or name, f) for name, f in model.model_fields.items())
        text += [f"## {model.__name__}", model.__doc__ or "", f"| field | type | what |\n|---|---|---|\n{rows}"]
    return "\n\n".join(part.strip() for part in text) + "\n"


def _row(name: str, f: FieldInfo) -> str:
    kind = f.annotation.__name__ if isinstance(f.annotation, type) and not get_args(f.annotation) else str(f.annotation)
    kind = re.sub(r"harness\.ledger\.|__main__\.", "", re.sub(r"typing\.Literal\[(.*?)\]", r"\1", kind))
    kind = kind.replace("None", "null").replace(" | ", " or ")
    return f"| `{name}` | `{kind}` | {(f.description or '').replace('|', '&#124;')} |"


_MORE = """\
`ledger/` is the truth; everything else here, `asv/` and every report, is made from it again at any time
(`adphys export-asv`, `adphys report`). A folder in it is a machine class: CPU model, cores, memory, GPU. Numbers of
different classes are never compared.

Every line is one JSON object without NaN or infinity; `kind` says which of the records below it is (context, cell, as_is,
floor, end). Where an address has several cell records, the last one counts. Readers ignore fields that they do not know; what
an existing field means changes only with `schema`, now {schema}. A cell that is not `ok` has no times.
`harness.ledger.schema()` returns all of this as a JSON Schema."""


if __name__ == "__main__":
    print(readme(), end="")
