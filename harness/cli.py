"""The command line. The only module that knows every room: problems, backends, harness, results, reports."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from harness import ROOT, UserError, cells, environments, ledger, run, source
from harness.measure import measure
from harness.statistics import summary

app = typer.Typer(add_completion=False, no_args_is_help=False, rich_markup_mode=None, pretty_exceptions_enable=False)

WHAT = """\
Adphys compares automatic-differentiation (AD) strategies on physics problems: how fast, how much memory, how right.
A cell is one way to differentiate one task at one size, as in brusselator.rhs/jax/reverse@small.

  adphys list                                             what there is
  adphys gradient brusselator.rhs/jax/reverse@N=64        one gradient: checked, then timed
  adphys run --preset quick && adphys report              every task with every backend once, and the report of it

adphys COMMAND --help says more; README.md says what is timed and what is not.
"""

Pattern = Annotated[
    list[str] | None, typer.Argument(metavar="[PATTERN ...]", help="fnmatch over addresses; missing parts match all")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, nothing else")]


@app.callback(invoke_without_command=True)
def what(context: typer.Context) -> None:
    """Compare automatic-differentiation strategies on physics problems."""
    if context.invoked_subcommand is None:
        print(WHAT, end="")


@app.command("list")
def list_(pattern: Annotated[str, typer.Argument(metavar="[PATTERN]")] = "*", as_json: Json = False) -> None:
    """Cells, with status and reason where they are known without running."""
    found = [(cell, *cells.known_status(cell)) for cell in cells.cells(pattern)]
    if as_json:
        print(
            json.dumps(
                [{"cell": c.address, "status": s or None, "reason": why or None} for c, s, why in found], indent=1
            )
        )
        return
    table = Table("cell", "status", "reason", box=None, pad_edge=False)
    for cell, status, reason in found:
        table.add_row(cell.address, status, reason)
    _out(wide=False).print(table)


@app.command("run")
def run_(
    patterns: Pattern = None,
    preset: Annotated[str, typer.Option(help="quick, default or full")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="go on with the newest unfinished run")] = False,
) -> None:
    """Measure cells into a new ledger file."""
    console = Console(stderr=True)
    if resume:
        if patterns or preset:
            raise UserError(
                "--resume goes on with the plan of the run that was cut off; leave out patterns and --preset."
            )
        writer, context, before = run.resume()
    else:
        # patterns that name their cells want all of them; nothing named wants the quick run
        preset = preset or ("default" if patterns else "quick")
        if preset not in run.PRESETS:
            raise UserError(f"There is no preset {preset!r}; there are {', '.join(run.PRESETS)}.")
        if device not in ("cpu", "cuda"):
            raise UserError(f"There is no device {device!r}; there are cpu, cuda.")
        (writer, context), before = run.start(patterns or [], preset, device), None
    try:
        records = run.go(writer, context, before, console)
    except KeyboardInterrupt:
        print("Stopped; what is finished is in the ledger. Go on with adphys run --resume.", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"ledger: {_shown(writer.path)}")
    if all(r.status == "unavailable" for r in records):
        raise UserError(records[0].reason)
    if not run.sound(records):
        raise typer.Exit(1)


@app.command()
def gradient(cell: Annotated[str, typer.Argument(metavar="CELL")], as_json: Json = False) -> None:
    """One cell: loss, norm of each block of the gradient, error, timings. Nothing is written."""
    record = measure(cells.cell(cell), budget=0.5, number=1, limit=1800.0, least=1)
    s = summary(record)
    answer = {
        "cell": record.cell,
        "status": record.status,
        "reason": record.reason or None,
        "loss": record.loss,
        "blocks": record.blocks
        and {
            name: {key: getattr(block, key) for key in ("size", "norm", "dot_gold5", "error")}
            for name, block in record.blocks.items()
        },
        "error": record.error,
        "first_call_s": s and s.first_call,
        "median_s": s and s.derivative.median,
        "primal_median_s": s and s.primal.median,
    }
    if as_json:
        print(json.dumps(answer))
    else:
        _print_gradient(answer, record)
    if record.status == "unavailable":
        raise UserError(record.reason)
    if record.status != "ok":
        raise typer.Exit(1)


@app.command()
def show(
    task: Annotated[str, typer.Argument(metavar="TASK")],
    backends: Annotated[list[str], typer.Argument(metavar="BACKEND ...")],
) -> None:
    """Implementations side by side, in the terminal. A backend may name a form and a strategy: numba/adjoint, torch.inplace."""
    cells.task(task)
    panels = []
    for name in backends:
        ways = [c for c in cells.cells(f"{task}/{name}@small") if c.form]
        if not ways:
            raise UserError(f"Nobody wrote {task} for {name} yet; write it in problems/{task.partition('.')[0]}.")
        code = Syntax(source.source(ways[0]), "python", theme="ansi_dark", word_wrap=True)
        panels.append(Panel(code, title=f"{task}/{ways[0].way}, {source.lines(ways[0])} lines"))
    console = _out(wide=True)
    width = console.width // len(panels)
    if width < 60:
        console.print(*panels, sep="\n")
    else:
        for panel in panels:
            panel.width = width - 1
        console.print(Columns(panels, padding=(0, 1)))


@app.command()
def report(
    paths: Annotated[
        list[Path] | None,
        typer.Option("--ledger", metavar="PATH ...", help="files or folders; the newest run if left out"),
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[PATH ...]", help="more ledgers")] = None,
    to: Annotated[Path, typer.Option(help="folder to write to")] = ROOT / "reports" / "latest",
) -> None:
    """Markdown, CSV, SVG and one HTML page of the ledger."""
    found = ledger.read([*(paths or []), *(more or [])] or _newest())
    from reports import write

    index = write(found, to)
    print(f"report: {_shown(index)}")


@app.command("export-asv")
def export_asv(
    paths: Annotated[
        list[Path] | None, typer.Option("--ledger", metavar="PATH ...", help="files or folders; all runs if left out")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[PATH ...]", help="more ledgers")] = None,
) -> None:
    """Write the ledger as asv results, without measuring again."""
    from harness.asv_export import export

    written = export(ledger.read([*(paths or []), *(more or [])] or [ledger.FOLDER]))
    print(f"asv results: {_shown(written)}")


env = typer.Typer(add_completion=False, help="Environments of their own, for backends whose pins conflict with ours.")
app.add_typer(env, name="env")


@env.command("list")
def env_list() -> None:
    """Which there are, and which of them are made."""
    table = Table("environment", "made", "where", "backends", box=None, pad_edge=False)
    for name, libraries in _environments().items():
        made, where = environments.is_made(cells.backend(libraries[0])), _shown(environments.folder(name))
        table.add_row(name, "yes" if made else "no", where if made else "", " ".join(libraries))
    _out(wide=False).print(table)


@env.command("create")
def env_create(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Make one: download and install exactly what its backend pins."""
    known = _environments()
    if name not in known:
        raise UserError(f"There is no environment {name!r} to create; there are {', '.join(known)}.")
    print(f"environment: {_shown(environments.create(cells.backend(known[name][0])))}")


def _environments() -> dict[str, list[str]]:
    """Environment -> the backends that run in it, without the main one."""
    found: dict[str, list[str]] = {}
    for name in cells.backends():
        if (own := cells.backend(name).env) != "main":
            found.setdefault(own, []).append(name)
    return found


def _newest() -> list[Path]:
    found = ledger.runs()
    if not found:
        raise UserError("There is no ledger of this machine yet; run `adphys run` first, or name one with --ledger.")
    return found[-1:]


def _print_gradient(answer: dict, record: ledger.CellRecord) -> None:
    out = _out(wide=False)
    out.print(f"{answer['cell']}: {answer['status']}. {answer['reason'] or ''}", soft_wrap=True, highlight=False)
    if answer["loss"] is not None:
        out.print(f"loss {answer['loss']!r}, judged by {record.judge}", highlight=False)
        table = Table("block", "size", "norm", "dot_gold5", "error", box=None, pad_edge=False)
        for name, block in answer["blocks"].items():
            table.add_row(name, *(_short(block[key]) for key in ("size", "norm", "dot_gold5", "error")))
        out.print(table)
    if answer["median_s"] is not None:
        times = {
            "first call": answer["first_call_s"],
            "derivative": answer["median_s"],
            "primal": answer["primal_median_s"],
        }
        out.print(", ".join(f"{name} {run.seconds(t)}" for name, t in times.items()), highlight=False)


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.10g}"


def _out(wide: bool) -> Console:
    """Full width where a terminal shows it, no wrapping at 80 where a pipe reads it."""
    return Console() if sys.stdout.isatty() else Console(width=240 if not wide else 200, highlight=False)


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main() -> None:
    """The entry point: a UserError is one sentence on stderr and exit code 2."""
    try:
        app()
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
