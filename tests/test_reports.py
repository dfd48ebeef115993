"""Reports: what is in the ledger and nothing else, ordered by speed, and never a time where a cell is not ok."""

import csv
import math
import re
from pathlib import Path
from typing import get_args

import pytest

from harness import UserError
from harness.ledger import AsIs, CellRecord, Context, End, Floor, Run, Status
from reports import words, write

WHEN = "2026-11-24T12:00:00+00:00"


def samples(seconds, number=1):
    """Three samples: the minimum is `seconds`, the median 1.1 and the quartiles 1.05 and 1.15 times that."""
    return {
        "number": number,
        "wall": [1.2 * seconds, seconds, 1.1 * seconds],
        "cpu": [seconds] * 3,
        "reference": [4e-4] * 3,
    }


def cell(address, derivative=None, primal=1e-3, *, status="ok", reason="", keys=None, **rest):
    """A record, measured in one process where it is ok."""
    left, _, size = address.partition("@")
    task, library, strategy = left.split("/")
    problem, _, short = task.partition(".")
    backend, _, form = library.partition(".")
    process = {
        "first_call_s": 0.5,
        "derivative": samples(derivative or 1.0),
        "primal_first_call_s": 0.1,
        "primal": samples(primal),
        "memory": {"peak": 4096, "work": 8192, "device": None},
        "load1": 0.5,
        "steal_ticks": 0,
    }
    return CellRecord.model_validate(
        {
            "key": "0",
            "cell": address,
            "problem": problem,
            "task": short,
            "backend": backend,
            "form": form or "array",
            "strategy": strategy,
            "way": f"{library}/{strategy}",
            "size": size.split(",")[0],
            "size_keys": keys or {"N": {"tiny": 8.0, "small": 32.0, "large": 256.0}.get(size.split(",")[0], 64.0)},
            "device": "cpu",
            "dtype": "float64",
            "threads": 1,
            "status": status,
            "reason": reason,
            "error": 1e-13 if status == "ok" else None,
            "gate": 1e-10,
            "judge": "the hand adjoint",
            "lines": 12,
            "changed": 7,
            "processes": [process] if status == "ok" else [],
            "finished": WHEN,
            "wall_s": 1.0,
            "measured_s": 0.5,
        }
        | rest
    )


def floor(task="brusselator.rhs", size="large", triad=1e-4, copy=6e-5):
    problem, _, short = task.partition(".")
    return Floor.model_validate(
        {"problem": problem, "task": short, "size": size, "bytes": 2**20, "finished": WHEN}
        | {"triad": samples(triad), "copy": samples(copy)}
    )


def ledger(folder: Path, records, *, ended=True, torn=False, plan=None, name="20261124T120000Z-run", **context) -> Run:
    """Write a run's file and read it back."""
    cells = [r.cell for r in records if isinstance(r, CellRecord)]
    head = Context.model_validate(
        {
            "schema": 1,
            "run": name,
            "preset": "default",
            "patterns": [],
            "protocol": 1,
            "seed": 4711,
            "plan": plan or cells,
            "budget_s": 2.0,
            "processes": 1,
            "limit_s": 300.0,
            "machine": {"cpu": "Abacus", "cores": 2, "ram_gib": 8, "gpu": None},
            "machine_class": "abacus-2c-8g",
            "lock_hash": "10c4ed",
            "versions": {"numpy": "2.4.6"},
            "commit": "c0ffee",
            "dirty": True,
            "started": WHEN,
        }
        | context
    )
    everything = [head, *records] + ([End(finished=WHEN, wall_s=10.0, measured_s=7.0)] if ended else [])
    path = folder / f"{name}.jsonl"
    text = "".join(record.model_dump_json(by_alias=True) + "\n" for record in everything)
    path.write_text(text + '{"kind": "cell", "ke' * torn)
    return Run(path)


RHS = "brusselator.rhs"
MATRIX = [
    cell(f"{RHS}/torch/reverse@large", 9e-3, 1e-3),
    cell(f"{RHS}/jax/reverse@large", 2e-3, 4e-3),
    cell(f"{RHS}/numba/adjoint@large", 2.5e-4, 1e-4),
    cell(f"{RHS}/jax/forward@large", status="oom", reason="Memory ran out: 412 GB were asked for."),
    cell(f"{RHS}/torch.inplace/reverse@large", status="wrong", reason="Block u is off by 3.1e-02.", error=3.1e-2),
    cell(f"{RHS}/jax/reverse@small", 9e-5),
    cell(f"{RHS}/numba/adjoint@small", 6e-6),
    floor(),
]


@pytest.fixture
def report(tmp_path):
    """records, ... -> the folder of their report, with the three texts."""

    def make(records=MATRIX, **rest):
        return read(write([ledger(tmp_path, records, **rest)], tmp_path / "report"))

    return make


def read(index: Path):
    folder = index.parent
    assert index == folder / "index.html"
    rows = list(csv.DictReader((folder / "cells.csv").read_text().splitlines()))
    return (folder / "index.md").read_text(), index.read_text(), {row["cell"]: row for row in rows}


def table(markdown, title):
    """The rows of the Markdown table below a title, as dicts."""
    body = markdown.split(f"**{title}")[1].split("\n\n")[1].splitlines()
    split = [[field.strip() for field in line.strip("|").split("|")] for line in body]
    return [dict(zip(split[0], row, strict=True)) for row in split[2:]]


def test_ordered_by_speed_then_what_is_not_ok(report):
    markdown, html, _ = report()
    ways = ["numba/adjoint", "jax/reverse", "torch/reverse", "torch.inplace/reverse", "jax/forward"]
    assert [row["way"] for row in table(markdown, f"{RHS}, large")] == ways
    body = html.split(f"<strong>{RHS}, large")[1].split("<tbody>")[1].split("</tbody>")[0]
    assert re.findall(r'<th scope="row"><code>(.+?)</code>', body) == ways


def test_ratios_are_of_minima_at_the_same_place(report):
    markdown, _, rows = report()
    jax = rows[f"{RHS}/jax/reverse@large"]
    assert math.isclose(float(jax["derivative_over_primal"]), 2e-3 / 4e-3, rel_tol=1e-15)
    assert math.isclose(float(jax["derivative_over_adjoint"]), 2e-3 / 2.5e-4, rel_tol=1e-15)
    assert math.isclose(float(jax["derivative_over_floor"]), 2e-3 / 1e-4, rel_tol=1e-15)
    assert math.isclose(float(rows[f"{RHS}/jax/reverse@small"]["derivative_over_adjoint"]), 15, rel_tol=1e-12)
    assert rows[f"{RHS}/jax/reverse@small"]["derivative_over_floor"] == ""  # no floor was measured there
    shown = table(markdown, f"{RHS}, large")[1]
    assert shown == {
        "way": "jax/reverse",
        "form": "array",
        "status": "ok",
        "primal": "4.40 ms",
        "derivative": "2.20 ms (2.10–2.30)",
        "derivative / primal": "0.500",
        "derivative / hand adjoint": "8.00",
        "× floor": "20.0",
        "first call": "500 ms",
        "peak memory": "12 KiB",
        "error": "1.0e-13",
        "lines": "12",
        "rewritten": "7",
    }
    assert "× floor" not in table(markdown, f"{RHS}, small")[0]


def test_full_precision_in_the_csv(report):
    *_, rows = report([cell(f"{RHS}/numba/adjoint@large", 1 / 3), cell(f"{RHS}/jax/reverse@large", math.pi)])
    assert float(rows[f"{RHS}/jax/reverse@large"]["derivative_min_s"]) == math.pi
    assert float(rows[f"{RHS}/jax/reverse@large"]["derivative_over_adjoint"]) == math.pi / (1 / 3)


def test_what_is_not_ok_has_its_sentence_and_no_time(report):
    timed = {"processes": cell("x.y/a/b@large", 7.77e-3).processes}  # a ledger written by hand could hold them
    statuses = [s for s in get_args(Status) if s != "ok"]
    bad = {
        s: cell(f"{RHS}/{s}/forward@large", status=s, reason=f"The <reason> of this | {s} cell.").model_copy(
            update=timed
        )
        for s in statuses
    }
    markdown, html, rows = report([*MATRIX[:3], *bad.values()])
    shown = {row["way"]: row for row in table(markdown, f"{RHS}, large")}
    for k, (status, record) in enumerate(bad.items(), 1):
        row = shown[f"{status}/forward"]
        assert row["status"] == f"{status} [{k}]"
        assert {row[c] for c in ("primal", "derivative", "derivative / primal", "first call", "peak memory")} == {"–"}
        assert f"[{k}] `{status}/forward`: The \\<reason> of this | {status} cell." in markdown
        assert f"<code>{status}/forward</code>: The &lt;reason&gt; of this | {status} cell." in html
        written = rows[record.cell]
        assert written["reason"] == record.reason and written["status"] == status
        assert not any(value for c, value in written.items() if c.endswith("_s") and c not in ("adjoint_s", "floor_s"))
        assert not any(value for c, value in written.items() if "_over_" in c)
    for text in (markdown, html, str(rows)):
        assert "8.55 ms" not in text and "7.77" not in text and "0.00777" not in text


def test_conclusions_come_from_the_numbers(report):
    markdown, html, _ = report()
    assert "the fastest AD is `jax/reverse`, 2.20 ms, 8.00 times the hand adjoint (`numba/adjoint`, 275 µs)" in markdown
    assert "The hand adjoint takes 2.50 times the bandwidth floor." in markdown
    assert "7 cells: 5 ok, 1 wrong, 1 oom." in markdown
    assert "<code>jax/reverse</code>, 2.20 ms" in html
    other = [cell(f"{RHS}/torch/reverse@large", 1e-3), *MATRIX[1:]]
    markdown, _, _ = report(other)
    assert "the fastest AD is `torch/reverse`, 1.10 ms, 4.00 times" in markdown


def test_too_close_to_call(report):
    near = [cell(f"{RHS}/torch/reverse@large", 2.04e-3), *MATRIX[1:3]]
    assert "overlap with those of `torch/reverse`: too close to call" in report(near)[0]
    assert "too close to call" not in report()[0]


def test_no_correct_ad_is_said(report):
    markdown, *_ = report(MATRIX[2:5])
    assert f"**{RHS}** (large, N = 256): no AD way is ok among 3 cells" in markdown


def test_the_crossover_between_the_modes_is_named(report):
    def at(way, entries, seconds):
        block = {"size": entries, "norm": 1.0, "dot_gold5": 1.0, "error": 0.0}
        blocks = {"u": block | {"reference_norm": 1.0, "reference_nonzero": 1.0}}
        return cell(f"{RHS}/{way}@N={entries}", seconds, keys={"N": entries}, blocks=blocks)

    sizes = (7, 12, 40)
    grow = {"jax/forward": (1, 2, 9), "jax/reverse": (3, 3, 3), "torch/forward": (7, 8, 9), "torch/reverse": (5, 5, 5)}
    markdown, *_ = report([at(way, n, t) for way, times in grow.items() for n, t in zip(sizes, times, strict=True)])
    assert (
        f"**{RHS}**, which mode is faster by the entries of theta: `jax` forward up to 12, reverse from 40 on; "
        "`torch` reverse already at 7, the fewest here." in markdown
    )
    assert "which mode is faster" not in report([at("jax/reverse", 7, 1.0), at("jax/forward", 7, 1.0)])[0]


def test_floor_is_printed_and_a_slow_triad_is_owned_up_to(report):
    markdown, html, _ = report()
    assert "takes 100 µs (31.5 GB/s, 0.90 of the 35 GB/s of a plain copy)" in markdown
    assert "0.90 of the 35 GB/s" in html and "no floor to trust" not in html
    markdown, html, _ = report([*MATRIX[:-1], floor(triad=1.5e-4)])
    assert "no floor to trust" in markdown and "no floor to trust" in html


def as_is(library, form, status, reason="", error=None):
    return AsIs.model_validate(
        {"key": "0", "problem": "brusselator", "task": "rhs", "backend": library, "form": form, "strategy": "reverse"}
        | {"size": "tiny", "status": status, "reason": reason, "error": error}
        | {"commit": None, "dirty": None, "finished": WHEN}
    )


def test_what_became_of_the_statement_as_it_is(report):
    frozen = "TypeError: arrays are immutable."
    tried = [as_is("jax", "array", "ok", error=1e-15), as_is("jax", "inplace", "error", frozen)]
    tried += [
        as_is("torch", "array", "wrong", "The gradient of u is zero.", 1.0),
        as_is("torch", "inplace", "error", frozen),
    ]
    markdown, html, _ = report([*MATRIX, *tried])
    rows = re.findall(r"^\| (jax|torch) +\|(.*)\|$", markdown.split("## Must I rewrite my code?")[1], re.M)
    got = {library: [entry.strip() for entry in row.split("|")] for library, row in rows}
    assert got["jax"] == ["runs", "refused [1]", "7 of 12", "jax/reverse", "8.00"]
    assert got["torch"] == ["**wrong** [2]", "refused [1]", "7 of 12", "torch/reverse", "36.0"]
    for page in (markdown, html):
        assert frozen in page and "The gradient of u is zero." in page
    assert "Must I rewrite" not in report(MATRIX)[0]


def test_unlike_things_never_share_a_table(report):
    single = cell(f"{RHS}/jax/reverse@large,dtype=float32", 1e-3, dtype="float32")
    four = cell(f"{RHS}/numba/adjoint@large,threads=4", 1e-4, threads=4)
    ode = cell("old.solution/jax/reverse@large", 1e-3)
    markdown, _, rows = report([*MATRIX, single, four, ode])
    titles = re.findall(r"^## (CPU.*)$", markdown, re.M)
    assert titles == ["CPU, float32, 1 thread", "CPU, float64, 1 thread", "CPU, float64, 4 threads"] + [
        "CPU, float64, 1 thread, unknown reference"
    ]
    assert rows[single.cell]["derivative_over_adjoint"] == "" and rows[single.cell]["derivative_over_floor"] == ""
    assert rows[f"{RHS}/jax/reverse@large"]["derivative_over_adjoint"] == "8.0"  # not by the adjoint on 4 threads
    parts = markdown.split("\n## CPU")
    assert [row["way"] for row in table(parts[1], f"{RHS}, large")] == ["jax/reverse"]


def test_all_cores_stand_beside_one_thread(report):
    def two(way, size="large", **rest):
        return cell(f"{RHS}/{way}@{size},threads=2", threads=2, **rest)

    jax, torch = two("jax/reverse", derivative=1e-3, primal=4e-3), two("torch/reverse", status="timeout")
    small = two("numba/adjoint", "tiny", derivative=1e-6)
    markdown, html, _ = report([*MATRIX, jax, torch, small])
    part = markdown.split("## All cores")[1].split("\n## ")[0]
    rows = [[field.strip() for field in line.strip("|").split("|")] for line in part.splitlines() if "|" in line]
    assert rows[0] == ["task", "size", "way", "1 thread", "2 threads", "speed-up", "speed-up of the primal"]
    assert sorted(rows[2:]) == [
        [RHS, "large", "`jax/reverse`", "2.20 ms", "1.10 ms", "2.00", "1.00"],
        [RHS, "large", "`torch/reverse`", "9.90 ms", "timeout", "–", "–"],
        [RHS, "tiny", "`numba/adjoint`", "–", "1.10 µs", "–", "–"],
    ]
    assert "serial by design" in part and ">1.10 ms<" in html.split('id="cores"')[1]
    assert "All cores" not in report(MATRIX)[0]  # nor where threads are some of them
    assert "All cores" not in report([*MATRIX, cell(f"{RHS}/jax/reverse@large,threads=4", threads=4)])[0]


def test_continuous_reference_stands_apart(report, monkeypatch):
    from dataclasses import replace

    from harness import cells

    real = cells.tasks("brusselator")
    monkeypatch.setattr(
        cells,
        "tasks",
        lambda p: real | {"ode": replace(real["rhs"], reference="continuous")} if p == "brusselator" else {},
    )
    markdown, *_ = report([*MATRIX, cell("brusselator.ode/jax/reverse@large", 1e-3)])
    assert "## CPU, float64, 1 thread, continuous reference" in markdown
    assert "a time without its error says nothing" in markdown
    assert "brusselator.ode" not in markdown.split("\n## CPU")[2]
    tried = as_is("jax", "array", "ok", error=1e-5).model_copy(update={"task": "ode"})
    markdown, *_ = report([*MATRIX, cell("brusselator.ode/jax/reverse@large", 1e-3), tried])
    assert "brusselator.ode" in markdown.split("## Must I rewrite my code?")[1]


def test_a_task_of_another_version_keeps_its_rows(report):
    gone = cell("gone.away/forth/sideways@n=3", 1e-3, keys={"n": 3.0, "m": 2.0})
    markdown, html, rows = report([*MATRIX, gone])
    assert "`gone.away` is not in this version of the code" in markdown
    assert table(markdown, "gone.away, n = 3, m = 2")[0]["way"] == "forth/sideways"
    assert rows[gone.cell]["known"] == "False" and rows[gone.cell]["axis"] == "n"
    assert "Not a strategy of this version" in html


def test_unfinished_and_torn_runs_are_said(report):
    plan = [*(r.cell for r in MATRIX[:-1]), f"{RHS}/numpy/complex_step@small"]
    markdown, html, _ = report(ended=False, torn=True, plan=plan)
    for text in (markdown, html):
        assert "is unfinished: 7 of 8 planned cells are here" in text and "numpy/complex_step@small" in text
        assert "The last line of 20261124T120000Z-run.jsonl is torn" in text
    assert "unfinished" not in report()[0]


def test_later_records_win(tmp_path):
    old = ledger(tmp_path, MATRIX, name="20261124T120000Z-default")
    again = cell(f"{RHS}/jax/reverse@large", 1e-3, finished="2026-11-24T13:00:00+00:00")
    new = ledger(tmp_path, [again], name="20261124T130000Z-run", started="2026-11-24T13:00:00+00:00")
    for runs in ([old, new], [new, old]):
        markdown, _, rows = read(write(runs, tmp_path / "report"))
        assert len(rows) == 7
        assert rows[again.cell]["derivative_over_adjoint"] == "4.0"
        assert rows[again.cell]["run"] == "20261124T130000Z-run"
        assert "20261124T120000Z-default" in markdown  # both are named at the end


def test_a_size_is_the_same_however_it_is_written(tmp_path):
    keys = {"H": 50.0, "rtol": 1e-4}
    old = [cell(f"neural_ode.ode/{way}@H=50,rtol=1e-4", 2e-3, keys=keys) for way in ("numba/adjoint", "jax/reverse")]
    later = cell("neural_ode.ode/numba/adjoint@H=50,rtol=0.0001", 1e-3, keys=keys, finished="2026-11-24T13:00:00+00:00")
    runs = [ledger(tmp_path, old), ledger(tmp_path, [later], name="later", started="2026-11-24T13:00:00+00:00")]
    _, _, rows = read(write(runs, tmp_path / "report"))
    assert len(rows) == 2 and rows[old[1].cell]["derivative_over_adjoint"] == "2.0"
    assert rows[later.cell]["size"] == rows[old[1].cell]["size"]


def test_machines_and_protocols_are_not_mixed(tmp_path):
    here = ledger(tmp_path, MATRIX)
    there = ledger(tmp_path, MATRIX, name="there", machine_class="cray-1")
    with pytest.raises(UserError, match="different machines .*abacus-2c-8g, cray-1.* give the ledgers of one"):
        write([here, there], tmp_path / "report")
    with pytest.raises(UserError, match="different protocols"):
        write([here, ledger(tmp_path, MATRIX, name="later", protocol=2)], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("records", [[], [floor()]])
def test_empty_ledger(tmp_path, records):
    with pytest.raises(UserError, match="no finished cell in the ledger yet; run `adphys run"):
        write([ledger(tmp_path, records)], tmp_path / "report")
    with pytest.raises(UserError, match="no finished cell"):
        write([], tmp_path / "report")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .* name another folder with --to"):
        write([ledger(tmp_path, MATRIX)], tmp_path / "file")


def test_nothing_is_ok(report):
    markdown, html, _ = report([r for r in MATRIX if getattr(r, "status", "") in ("oom", "wrong")])
    assert "2 cells: 1 wrong, 1 oom." in markdown
    assert not re.search(r"\d (µs|ms)\b", markdown.split("## Columns")[0])


def test_html_stands_alone_and_is_well_formed(report):
    _, html, _ = report()
    loads = re.findall(r'(?:src|href|data|action|poster|srcset)="([^"]*)"', html)
    assert loads and all(link.startswith(("#", "data:,")) or link == "cells.csv" for link in loads)
    assert not re.search(r"@import|url\((?!#)|fetch\(|<img|<iframe", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in loads if link.startswith("#")} <= set(ids)
    assert {m for m in re.findall(r"url\(#([^)]+)\)", html)} <= set(ids)


def test_markdown_finds_its_pictures(report, tmp_path):
    markdown, *_ = report()
    pictures = re.findall(r"!\[[^]]+\]\((.+?)\)", markdown)
    assert {"figures/matrix.svg", "figures/matrix-small.svg", "figures/brusselator.rhs.svg"} == set(pictures)
    for name in pictures:
        assert (tmp_path / "report" / name).read_text().rstrip().endswith("</svg>")


def test_matrix_prints_every_number_and_status(report, tmp_path):
    report()
    svg = (tmp_path / "report/figures/matrix.svg").read_text()
    texts = re.findall(r">([^<>\n]+)</text>", svg)
    assert {"8.00", "36.0", "oom", "wrong", "numba/adjoint", "jax/forward", "rhs"} <= set(texts)
    assert "large, N = 256" in texts
    curves = (tmp_path / "report/figures/brusselator.rhs.svg").read_text()
    assert "bandwidth floor" in curves and "torch.inplace/reverse" not in curves  # a wrong cell has no point


def solved(way, N, seconds, *, rtol=1e-7, error=3e-6, **rest):
    """A cell of brusselator.ode whose blocks A and B have the error and a third of it, B's gradient being three times A's."""
    keys = {"N": N, "T": 1, "alpha": 10, "A": 3.4, "B": 1, "save": 0.1, "rtol": rtol, "atol": 100 * rtol}
    blocks = {
        name: {"size": N * N, "norm": n, "dot_gold5": 0.0, "error": e, "reference_norm": n, "reference_nonzero": 1.0}
        for name, n, e in (("A", 1.0, error), ("B", 3.0, error / 3))
    }
    rest = {"keys": keys | {"spread": 0.5, "k0": 1}, "error": error, "blocks": blocks, "gate": 0.1} | rest
    found = cell(f"brusselator.ode/{way}@N={N},rtol={rtol}", seconds, **rest)
    found.processes[0].stats = {"steps": 19, "linear_solves": 95}
    return found


def test_what_was_published_stands_beside_what_was_measured(report):
    records = [
        solved("numba/adjoint", 17, 2e-3 / 1.1),
        solved("numba/adjoint", 64, 0.2),
        solved("jax/reverse", 17, 4e-3 / 1.1),
        solved("torch/reverse", 17, 1e-3, keys={"N": 17, "spread": 0.0}),  # other parameters: not to be compared
    ]
    markdown, html, _ = report(records)
    table = markdown.split("beside what was published.**")[1].split("\n\n")
    assert "the hand adjoint, `numba/adjoint`, takes 1/116 of the time of the quickest published" in table[0]
    assert "the fastest AD, `jax/reverse`, takes 1/58 of the time of the quickest published" in table[0]
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in table[1].splitlines()]
    assert rows[0][1:7] == [f"N = {N}" for N in (5, 8, 10, 12, 17, 64)]
    by_name = {row[0]: row[1:] for row in rows}
    # sqrt(1 e^2 + 9 (e / 3)^2) / sqrt(10) = sqrt(2 / 10) e
    assert by_name["`numba/adjoint`"] == ["–", "–", "–", "–", "2.00 ms", "220 ms", "1.3e-06", "3.0e-06"]
    assert by_name["FBDF dense and Gauss adjoint (published)"][4:7] == ["1.28 s", "–", "4.1e-04"]
    assert "`torch/reverse`" not in by_name
    assert "19 steps, 95 linear solves" in markdown and "beside what was published" in html


def test_the_middle_stands_without_its_solves(report):
    def step(way, seconds, **stats):
        found = cell(f"shallow_ice.semi_implicit/{way}@small", seconds / 1.1, keys={"N": 32, "nst": 20, "A": 4e-17})
        found.processes[0].stats = {"steps": 20} | stats
        return found

    records = [step("numba/adjoint", 3e-3, solves_s=1e-3), step("jax/reverse", 7e-3, solves_s=1e-3)]
    records += [step("jax/checkpoint", 8e-3, solves_s=1e-3), step("casadi/tape", 0.05)]
    markdown, html, _ = report(records)
    table = markdown.split("without its solves.**")[1].split("\n\n")[1]
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["`numba/adjoint`"][:4] == ["3.00 ms", "1.00 ms", "2.00 ms", "1.00"]
    assert by_name["`jax/reverse`"][:4] == ["7.00 ms", "1.00 ms", "6.00 ms", "3.00"]
    assert by_name["`casadi/tape`"][:4] == ["50.0 ms", "–", "–", "–"]
    assert "LAPACK on the host" in by_name["`jax/reverse`"][4] and "`jax/checkpoint`" not in by_name
    assert "20 steps" in markdown and "solves s" not in markdown and "without its solves" in html


def test_time_against_error_is_drawn_from_three_tolerances_on(report, tmp_path):
    at = [(1e-5, 1e-3), (1e-7, 3e-6), (1e-8, 2e-7)]
    for n in (2, 3):
        records = [solved("numba/adjoint", 8, 1e-3 * k, rtol=r, error=e) for k, (r, e) in enumerate(at[:n], 1)]
        markdown, *_ = report(records)
        assert ("brusselator.ode-continuous-tolerances.svg" in markdown) == (n == 3)
    svg = (tmp_path / "report/figures/brusselator.ode-continuous-tolerances.svg").read_text()
    assert "error of the worst block" in svg and "numba/adjoint" in svg


def test_a_loop_that_stops_early_stands_beside_its_root(report):
    """The program's derivative is 1 % off that of the root; `implicit` ran at another tol and goes to the root anyway."""

    def loop(way, norm, reference, error, tol):
        keys = {"N": 50, "steps": 10, "tol": tol}
        blocks = {"lnA": {"size": 1, "norm": norm, "dot_gold5": 0.0, "error": error, "reference_norm": reference}}
        blocks["lnA"]["reference_nonzero"] = 1.0
        return cell(f"shallow_ice.pseudo_transient/{way}@N=50,tol={tol}", 1e-3, keys=keys, blocks=blocks, error=error)

    markdown, html, _ = report(
        [loop("numba/adjoint", 1.98, 1.98, 1e-13, 1e-5), loop("jax/implicit", 2.0, 2.0, 3e-10, 1e-4)]
    )
    part = markdown.split("### A loop that stops at a tolerance")[1].split("\n\n")
    row = [x.strip() for x in part[2].splitlines()[-1].strip("|").split("|")]
    assert row[2:] == ["`numba/adjoint`", "1.0e-02", "`jax/implicit`", "3.0e-10"]
    assert 'id="wanted"' in html


def test_around_the_solver_stands_beside_through_it(report):
    records = [solved("numba/adjoint", 8, 1e-3), solved("torch/reverse", 17, 1e-3)]
    assert "Through the solver, or around it" not in report(records)[0]
    markdown, *_ = report([*records, solved("jax/backsolve", 8, 2e-3, error=4e-2)])
    part = markdown.split("### Through the solver, or around it")[1].split("## ")[0]
    assert [way in part for way in ("numba/adjoint", "jax/backsolve", "torch/reverse")] == [True, True, False]
    assert part.index("numba/adjoint") < part.index("jax/backsolve")  # by error
    at = "brusselator.ode/jax.diffrax-kvaerno5/backsolve@small"
    no = cell(at, status="unsupported", reason="Diffusion has no way back.", keys=records[0].size_keys)
    markdown, *_ = report([*records, solved("casadi/interpolating", 8, 2e-3), no])
    assert "Not at all brusselator.ode by `jax.diffrax-kvaerno5/backsolve`: Diffusion has no way back." in markdown


def test_same_ledger_same_bytes(report, tmp_path):
    def everything():
        report()
        files = sorted(p for p in (tmp_path / "report").rglob("*") if p.is_file())
        return {p.name: p.read_bytes() for p in files}

    assert everything() == everything()


def test_provenance(report):
    markdown, html, _ = report()
    for text in (markdown, html):
        for word in (
            "Abacus",
            "c0ffee, with uncommitted changes",
            "10c4ed",
            "4711",
            "20261124T120000Z-run",
            "numpy 2.4.6",
        ):
            assert word in text
        assert "wait(derivative(theta, data))" in text and "high-water mark" in text
        assert str(Path.cwd()) not in text


def test_every_status_is_explained():
    assert tuple(words.STATUSES) == get_args(Status)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.2345e-6, "1.23 µs"),
        (9.9951e-4, "1.00 ms"),
        (0.5, "500 ms"),
        (1.2, "1.20 s"),
        (1234.0, "1,230 s"),
        (None, "–"),
    ],
)
def test_seconds(value, text):
    assert words.seconds(value) == text


def test_sizes_off_the_axis_are_in_the_tables_only(report, tmp_path):
    def at(n, **other):
        text = ",".join(f"{k}={v:g}" for k, v in ({"N": n} | other).items())
        return cell(f"{RHS}/jax/reverse@{text}", 1e-3, size=text, keys={"N": float(n), "alpha": 10.0} | other)

    named = cell(f"{RHS}/jax/reverse@small", 1e-3, keys={"N": 32.0, "alpha": 10.0})
    markdown, *_ = report([named, at(64), at(128, alpha=0.5)])
    assert "Sizes that differ in more than N are in the tables only: N=128,alpha=0.5." in markdown
    ticks = re.findall(r">([\d]+)</text>", (tmp_path / "report/figures/brusselator.rhs.svg").read_text())
    assert {"32", "64"} <= set(ticks) and "128" not in ticks
    more = cell(f"{RHS}/jax/reverse@large", 1e-2, keys={"N": 256.0, "alpha": 1.0})
    assert "From size to size more than N changes" in report([named, more])[0]
    assert "From size to size" not in markdown
