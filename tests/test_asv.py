"""asv: the ledger goes out and asv's own commands read the same numbers back; the suite that asv runs itself."""

import importlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
from asv.config import Config
from asv.results import Results
from asv.util import load_json
from conftest import ROOT, is_sentence

from harness import PROTOCOL, UserError, asv_shared, ledger, run
from harness.asv_export import METRICS, export

CONF = load_json(str(ROOT / "asv.conf.json"), js_comments=True)
MACHINE = "some-cpu-2c-8g"
KERNEL = 4e-4
ONE_CELL = r"brusselator\.rhs\..*'numba/adjoint'"
GIT = {f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


# The way round


class Repository:
    """Two commits of the Brusselator's statement under a copy of asv.conf.json."""

    def __init__(self, folder):
        self.folder = folder
        self.statement = folder / "problems" / "brusselator" / "__init__.py"
        self.statement.parent.mkdir(parents=True)
        self.statement.write_bytes((ROOT / "problems/brusselator/__init__.py").read_bytes())
        (folder / "asv.conf.json").write_text(json.dumps(CONF))
        self.git("init", "--quiet", "--initial-branch", "trunk")
        self.commits = [self.commit("2026-01-01"), self.commit("2026-01-02")]

    def git(self, *words, **environ):
        return subprocess.run(
            ["git", *words], cwd=self.folder, env=os.environ | GIT | environ, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self, day):
        self.git("add", "--all")
        date = {f"GIT_{who}_DATE": f"{day}T12:00:00" for who in ("AUTHOR", "COMMITTER")}
        self.git("commit", "--quiet", "--allow-empty", "--message", day, **date)
        return self.git("rev-parse", "HEAD")

    def asv(self, *words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "asv", *words], cwd=self.folder, capture_output=True, text=True, errors="replace"
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def results(self, commit):
        return Results.load(str(self.folder / "results" / "asv" / MACHINE / f"{commit[:8]}-ledger.json"))


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


def process(*wall, number=10):
    """A process whose primal takes half as long, beside a reference kernel of a constant time."""

    def samples(scale):
        times = [scale * t for t in wall]
        return {"number": number, "wall": times, "cpu": times, "reference": [KERNEL] * len(times)}

    return {
        "first_call_s": 1000 * min(wall),
        "derivative": samples(1),
        "primal_first_call_s": 1.0,
        "primal": samples(0.5),
        "memory": {"peak": 3000, "work": 96, "device": None},
        "load1": 0.0,
        "steal_ticks": None,
    }


def cell(address, commit, *processes, status="ok", dirty=False, finished="2026-01-03T00:00:00+00:00"):
    way, _, size = address.partition("@")
    name, library, strategy = way.split("/")
    problem, _, task = name.partition(".")
    library, _, form = library.partition(".")
    return {
        "kind": "cell",
        "key": "k",
        "cell": address,
        "problem": problem,
        "task": task,
        "backend": library,
        "form": form or "array",
        "strategy": strategy,
        "way": way.partition("/")[2],
        "size": size,
        "size_keys": {"N": 32},
        "device": "cpu",
        "dtype": "float64",
        "threads": 1,
        "status": status,
        "reason": "" if status == "ok" else "For this reason.",
        "processes": processes,
        "commit": commit,
        "dirty": dirty,
        "finished": finished,
        "wall_s": 1.0,
        "measured_s": 0.5,
    }


def ledger_of(path, *cells, protocol=PROTOCOL):
    context = {
        "kind": "context",
        "schema": 1,
        "run": path.stem,
        "preset": "default",
        "patterns": [],
        "protocol": protocol,
        "seed": 1,
        "plan": [c["cell"] for c in cells],
        "budget_s": 1.0,
        "processes": 3,
        "limit_s": 60.0,
        "machine": {
            "cpu": "Some CPU",
            "cores": 2,
            "ram_gib": 8,
            "os": "Linux 6.1",
            "arch": "x86_64",
            "python": "3.12.1",
        },
        "machine_class": MACHINE,
        "lock_hash": "l",
        "versions": {"jax": "0.1.2"},
        "commit": None,
        "dirty": None,
        "started": "2026-01-03T00:00:00+00:00",
    }
    path.write_text("".join(json.dumps(record) + "\n" for record in (context, *cells)))
    return ledger.read([path])


def three(t):
    """Three processes whose minima are 1, 1.1 and 1.3 t: the median of them is 1.1 t."""
    return process(2 * t, 1.3 * t, 5 * t), process(1.0 * t, 3 * t), process(1.1 * t, 1.2 * t)


def written(repository, tmp_path):
    """Two runs, one a commit, exported."""
    first, second = repository.commits
    runs = ledger_of(
        tmp_path / "first.jsonl",
        cell("brusselator.rhs/numba/adjoint@small", first, *three(1e-5)),
        cell("brusselator.rhs/jax/reverse@small", first, *three(4e-5)),
        cell("brusselator.rhs/jax/forward@small", first, status="unsupported"),
        cell("brusselator.rhs/numba/duals@small", first, status="missing"),
        cell("brusselator.rhs/torch/reverse@small", first, status="unavailable"),
        cell("brusselator.rhs/torch.inplace/reverse@small", first, *three(7e-5)),
        cell("brusselator.imex/jax/reverse@N=64,threads=2", first, process(2.0)),
    ) + ledger_of(
        tmp_path / "second.jsonl",
        cell("brusselator.rhs/numba/adjoint@small", second, *three(2e-5)),
        cell("brusselator.rhs/jax/reverse@small", second, *three(4e-5)),
        cell("brusselator.rhs/torch.inplace/reverse@small", second, status="wrong"),
        cell("brusselator.rhs/jax/forward@small", second, status="timeout"),
        cell("brusselator.imex/jax/reverse@N=64,threads=2", second, process(3.0)),
    )
    return export(runs, repository.folder)


def row(text, way):
    """What asv show prints in the line of a way."""
    return re.search(rf"^ +{re.escape(way)} +(.+?) *$", text, re.M)[1]


def test_asv_show_reads_back(repository, tmp_path):
    assert written(repository, tmp_path) == repository.folder / "results" / "asv"
    assert repository.commits[0][:8] in repository.asv("show")
    first = repository.asv("show", repository.commits[0], "--bench", r"brusselator\.rhs\.derivative\b")
    assert row(first, "numba/adjoint").startswith("11.0±")
    assert row(first, "jax/reverse").startswith("44.0±")
    assert [row(first, way) for way in ("jax/forward", "numba/duals", "torch/reverse")] == ["n/a"] * 3
    second = repository.asv("show", repository.commits[1], "--bench", r"brusselator\.rhs\.derivative\b")
    assert row(second, "numba/adjoint").startswith("22.0±")
    assert [row(second, way) for way in ("torch.inplace/reverse", "jax/forward")] == ["failed"] * 2
    assert row(second, "torch/reverse") == "n/a"  # not measured there


def test_every_metric_is_that_of_the_ledger(repository, tmp_path):
    written(repository, tmp_path)
    results = repository.results(repository.commits[0])
    params = [["'numba/adjoint'"], ["'small'"]]
    found = {m.name: results.get_result_value(f"brusselator.rhs.{m.name}", params)[0] for m in METRICS}
    assert found == pytest.approx(
        {
            "derivative": 1.1e-5,
            "primal": 0.55e-5,
            "first_call": 1.1e-2,
            "peak_memory": 3096,
            "derivative_in_kernels": 1.1e-5 / KERNEL,
        }
    )
    samples = results.get_result_samples("brusselator.rhs.derivative", params)[0]
    assert sorted(samples) == pytest.approx([1.0e-5, 1.1e-5, 1.3e-5])  # one number a process
    own = results.get_result_value("brusselator.imex.primal", [["'jax/reverse'"], ["'N=64,threads=2'"]])
    assert own == [1.0]


def test_a_cell_that_is_not_ok_never_gets_a_time(repository, tmp_path):
    """Whatever its record holds; and each status is what asv calls it."""
    commit = repository.commits[0]
    statuses = ledger.CellRecord.model_fields["status"].annotation.__args__
    cells = [cell(f"brusselator.rhs/jax/{s}@small", commit, process(1.0), status=s) for s in statuses]
    export(ledger_of(tmp_path / "run.jsonl", *cells), repository.folder)
    results = repository.results(commit)
    for metric in METRICS:
        name = f"brusselator.rhs.{metric.name}"
        for status in statuses:
            params = [[f"'jax/{status}'"], ["'small'"]]
            (value,), samples = results.get_result_value(name, params), results.get_result_samples(name, params)
            if status == "ok":
                assert value > 0
            elif status in ("unsupported", "missing", "unavailable"):
                assert math.isnan(value) and samples == [None]
            else:
                assert value is None and samples == [None]


def test_asv_compare_reads_back(repository, tmp_path):
    written(repository, tmp_path)
    table = repository.asv("compare", *repository.commits, "--no-stats")
    lines = {
        line[line.index("brusselator") :].rstrip("| "): line for line in table.splitlines() if "brusselator" in line
    }
    slower = lines["brusselator.rhs.derivative('numba/adjoint', 'small')"]
    assert slower.startswith("| + ") and "11.0" in slower and "22.0" in slower and "2.00" in slower
    same = lines["brusselator.rhs.derivative('jax/reverse', 'small')"]
    assert same.startswith("|   ") and "1.00" in same
    assert lines["brusselator.rhs.derivative('torch.inplace/reverse', 'small')"].startswith("| ! ")  # became wrong
    imex = lines["brusselator.imex.derivative('jax/reverse', 'N=64,threads=2')"]
    assert imex.startswith("| + ") and "1.50" in imex


def test_asv_publish_reads_back(repository, tmp_path):
    written(repository, tmp_path)
    repository.asv("publish")
    html = repository.folder / "reports" / "html"
    index = json.loads((html / "index.json").read_text())
    assert set(index["benchmarks"]) == {f"brusselator.{t}.{m.name}" for t in ("rhs", "imex") for m in METRICS}
    fixed = {"machine": [MACHINE], "os": ["Linux"], "arch": ["x86_64"], "cpu": [MACHINE], "num_cpu": ["2"]}
    assert index["params"] == fixed | {"ram": ["8 GiB"], "python": ["3.11"], "branch": ["HEAD"]}
    (graph,) = html.glob("graphs/arch-*/**/brusselator.rhs.derivative.json")
    ways, sizes = index["benchmarks"]["brusselator.rhs.derivative"]["params"]
    assert sizes == ["'small'"]
    points = [dict(zip(ways, values, strict=True)) for _, values in json.loads(graph.read_text())]
    assert [p["'numba/adjoint'"] for p in points] == pytest.approx([1.1e-5, 2.2e-5])
    assert [p["'torch.inplace/reverse'"] for p in points] == [pytest.approx(7.7e-5), None]
    assert [p["'torch/reverse'"] for p in points] == [None, None]


# What is exported


def test_only_what_belongs_to_a_commit_is_exported(repository, tmp_path, capsys):
    commit, address = repository.commits[0], "brusselator.rhs/jax/{}@small"
    runs = ledger_of(
        tmp_path / "run.jsonl",
        cell(address.format("reverse"), commit, process(1.0)),
        cell(address.format("forward"), commit, process(1.0), dirty=True),
        cell(address.format("checkpoint"), "f" * 40, process(1.0)),
        cell(address.format("tape"), None, process(1.0)),
        cell("other.rhs/jax/reverse@small", commit, process(1.0)),
    )
    export(runs, repository.folder)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(
        is_sentence(line).startswith("Cells of run.jsonl not exported to asv: 1, because") for line in said
    )
    for word in ("differed", "ffffffff", "outside", "problem other"):
        assert sum(word in line for line in said) == 1
    described = load_json(str(repository.folder / "results/asv/benchmarks.json"))
    assert described["brusselator.rhs.primal"]["params"] == [["'jax/reverse'"], ["'small'"]]


def test_nothing_to_export_is_refused_and_loses_nothing(repository, tmp_path):
    written(repository, tmp_path)
    before = {p: p.read_bytes() for p in (repository.folder / "results").rglob("*.json")}
    dirty = cell("brusselator.rhs/jax/reverse@small", repository.commits[0], process(1.0), dirty=True)
    with pytest.raises(UserError, match="not exported to asv: 1, because the tree differed") as e:
        export(ledger_of(tmp_path / "dirty.jsonl", dirty), repository.folder)
    is_sentence(str(e.value))
    assert {p: p.read_bytes() for p in (repository.folder / "results").rglob("*.json")} == before


def test_what_cannot_be_exported_is_refused_in_a_sentence(repository, tmp_path):
    with pytest.raises(UserError, match="no cells") as e:
        export(ledger_of(tmp_path / "empty.jsonl"), repository.folder)
    is_sentence(str(e.value))
    (repository.folder / "results").write_text("a file")
    with pytest.raises(UserError, match="cannot be written") as e:
        written(repository, tmp_path)
    is_sentence(str(e.value))
    (repository.folder / "asv.conf.json").unlink()
    with pytest.raises(UserError, match="configuration") as e:
        written(repository, tmp_path)
    is_sentence(str(e.value))


def test_the_later_run_wins_cell_by_cell(repository, tmp_path):
    commit, address = repository.commits[0], "brusselator.rhs/jax/{}@small"
    old = ledger_of(
        tmp_path / "b.jsonl",
        cell(address.format("reverse"), commit, process(1.0), finished="2026-01-03T00:00:00+00:00"),
        cell(address.format("forward"), commit, process(5.0), finished="2026-01-03T00:00:00+00:00"),
    )
    new = ledger_of(
        tmp_path / "a.jsonl",
        cell(address.format("reverse"), commit, process(2.0), finished="2026-01-04T00:00:00+00:00"),
    )
    export(new + old, repository.folder)
    params = [["'jax/forward'", "'jax/reverse'"], ["'small'"]]
    assert repository.results(commit).get_result_value("brusselator.rhs.derivative", params) == [5.0, 2.0]


def test_an_export_replaces_the_one_before_and_keeps_what_asv_measured(repository, tmp_path):
    folder = written(repository, tmp_path)
    described = json.loads((folder / "benchmarks.json").read_text())
    own = {"name": "brusselator.rhs.track_derivative", "params": [], "param_names": [], "version": "1", "type": "time"}
    described[own["name"]] = own | {"unit": "seconds", "code": ""}
    (folder / "benchmarks.json").write_text(json.dumps(described))
    (folder / MACHINE / f"{repository.commits[0][:8]}-virtualenv-py3.11.json").write_text("{}")
    only = cell("brusselator.rhs/jax/reverse@small", repository.commits[1], process(1.0))
    export(ledger_of(tmp_path / "other.jsonl", only), repository.folder)
    assert sorted(p.name for p in (folder / MACHINE).iterdir()) == sorted(
        [
            "machine.json",
            f"{repository.commits[1][:8]}-ledger.json",
            f"{repository.commits[0][:8]}-virtualenv-py3.11.json",
        ]
    )
    names = set(load_json(str(folder / "benchmarks.json")))
    assert names == {"version", own["name"]} | {f"brusselator.rhs.{m.name}" for m in METRICS}


def test_edited_physics_is_not_compared_with_old_numbers(repository, tmp_path):
    text = repository.statement.read_text()
    repository.statement.write_text(text.replace("FORCING, T_FORCING = 5.0,", "FORCING, T_FORCING = 6.0,"))
    assert repository.statement.read_text() != text
    edited = repository.commit("2026-01-05")
    address = "brusselator.rhs/jax/reverse@small"
    runs = [
        ledger_of(tmp_path / f"{commit}.jsonl", cell(address, commit, process(1.0)))[0]
        for commit in (edited, repository.commits[1])
    ]
    export(runs, repository.folder)
    assert "brusselator.rhs.derivative" not in repository.asv("show", repository.commits[1])
    assert "brusselator.rhs.derivative" in repository.asv("show", edited)


def test_version():
    text = (ROOT / "problems/brusselator/__init__.py").read_text()
    of = asv_shared.version(1, text, "rhs")
    assert asv_shared.version(2, text, "rhs") != of
    assert asv_shared.version(1, text, "imex") != of
    same = [
        '"""Another docstring."""\n' + text.partition('"""')[2].partition('"""')[2],
        text.replace("FORCING, T_FORCING = 5.0, 1.1", "FORCING, T_FORCING = (5.0, 1.1)  # a comment"),
        text.replace('floor="u"', 'floor="A"').replace("gate=1e-10", "gate=1e-9"),
        text.replace("dt: float = 0.005", "dt: float = 0.006"),  # of the other task
        text.replace("TASKS = {", "def another():\n    return FORCING\n\n\nTASKS = {", 1),
    ]
    other = [
        text.replace("FORCING, T_FORCING = 5.0, 1.1", "FORCING, T_FORCING = 5.0, 1.2"),
        text.replace('"small": Rhs(32)', '"small": Rhs(33)'),
        text.replace("t: float = 2.0", "t: float = 3.0"),
    ]
    assert all(changed != text for changed in same + other)
    assert [asv_shared.version(1, changed, "rhs") for changed in same] == [of] * len(same)
    assert of not in [asv_shared.version(1, changed, "rhs") for changed in other]
    assert asv_shared.version(1, "TASKS = make()\nx = 1", "rhs") != asv_shared.version(
        1, "TASKS = make()\nx = 2", "rhs"
    )


# asv.conf.json


def test_configuration():
    """asv ignores a mistyped key without a word."""
    assert set(CONF) - {"version"} <= set(vars(Config()))
    assert set(CONF["matrix"]) <= {"req", "env", "env_nobuild"}
    fixed = {"benchmark_dir": "harness/asv_suite", "results_dir": "results/asv", "html_dir": "reports/html"}
    assert {key: CONF[key] for key in fixed} == fixed
    lock = (ROOT / "constraints.txt").read_text()
    assert f"\nasv_runner=={CONF['matrix']['req']['pip+asv_runner'][0]}\n" in lock
    for pattern in CONF["regressions_thresholds"]:
        hits = [m.name for m in METRICS if re.match(pattern, f"brusselator.rhs.{m.name}('jax/reverse', 'small')")]
        assert len(hits) == 1, (pattern, hits)


def test_asv_can_tell_any_number_of_processes_apart(repository, tmp_path):
    """Six a side it never could."""
    names = {n: f"brusselator.rhs/jax/{n}@small" for n in (2, 3, 5, 6, 7)}
    runs = [
        ledger_of(
            tmp_path / f"{k}.jsonl",
            *(cell(a, commit, *[process(k + 1 + j / 1e3) for j in range(n)]) for n, a in names.items()),
        )[0]
        for k, commit in enumerate(repository.commits)
    ]
    export(runs, repository.folder)
    table = repository.asv("compare", *repository.commits)
    assert len(re.findall(r"^\| \+ .*rhs\.derivative\(", table, re.M)) == len(names), table
    assert 6 not in {b.rounds for b in suite().values()}


# The suite that asv runs


def suite():
    """Name -> benchmark."""
    module = importlib.reload(importlib.import_module("harness.asv_suite"))
    return {b.benchmark_name: b for name, b in vars(module).items() if name.startswith("track_")}


def test_asv_check():
    done = subprocess.run(
        [sys.executable, "-m", "asv", "check", "--environment", "existing:same"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "No problems found" in done.stdout, done.stdout + done.stderr


def test_suite_is_the_quick_cells_whatever_is_installed(monkeypatch):
    here = {name: (b.params, b.version) for name, b in suite().items()}
    cells = {(c.name, c.way, c.size) for c in run.plan([], "quick", "cpu")}
    assert {
        (name.removesuffix(".track_derivative"), way, size)
        for name, ((ways, sizes), _) in here.items()
        for way in ways
        for size in sizes
    } == cells
    monkeypatch.setattr("harness.cells.installed", lambda *_: False)
    assert {name: (b.params, b.version) for name, b in suite().items()} == here


def test_suite_says_what_asv_understands(monkeypatch, tmp_path):
    from asv_runner.benchmarks.mark import SkipNotImplemented

    benchmark = suite()["brusselator.rhs.track_derivative"]
    address, found = "brusselator.rhs/numba/adjoint@small", {}
    monkeypatch.setattr("harness.measure.measure", lambda *_, **__: ledger.CellRecord.model_validate(found))
    found |= cell(address, None, process(3.0, 2.0, number=7))
    assert benchmark("numba/adjoint", "small") == {"samples": [2.0], "number": 7}
    for status, error in {"wrong": RuntimeError, "timeout": RuntimeError, "unavailable": SkipNotImplemented}.items():
        found |= cell(address, None, status=status)
        with pytest.raises(error, match="For this reason"):
            benchmark("numba/adjoint", "small")
    assert benchmark.setup("numba/adjoint", "small") is None
    monkeypatch.setattr("harness.cells.known_status", lambda cell: ("missing", "Nobody wrote it."))
    with pytest.raises(NotImplementedError, match="Nobody wrote it"):
        benchmark.setup("numba/adjoint", "small")


def asv_at_home(folder, home, *words):
    """asv in a folder, with a home of its own, because it asks there about the machine."""
    home.mkdir(exist_ok=True)
    environ = os.environ | {"HOME": str(home)}
    for command in (["machine", "--yes"], words):
        done = subprocess.run(
            [sys.executable, "-m", "asv", *command], cwd=folder, env=environ, capture_output=True, text=True
        )
    return done


def test_asv_runs_a_quick_cell(repository, tmp_path, cache, monkeypatch):
    """The suite of this tree, with results that go elsewhere."""
    monkeypatch.setenv("ADPHYS_CACHE", str(cache))
    elsewhere = CONF | {"benchmark_dir": str(ROOT / CONF["benchmark_dir"])}
    (repository.folder / "asv.conf.json").write_text(json.dumps(elsewhere))
    words = "run", "--quick", "--environment", "existing:same", "--show-stderr", "--bench", ONE_CELL
    done = asv_at_home(repository.folder, tmp_path / "home", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"[\d.]+±0(μs|ms)", row(done.stdout, "numba/adjoint")), done.stdout


@pytest.mark.skipif(
    "ADPHYS_SLOW" not in os.environ, reason="asv builds an environment: some minutes; set ADPHYS_SLOW=1"
)
def test_asv_compares_two_commits_in_an_environment_of_its_own(tree, tmp_path):
    for name in ("asv.conf.json", "README.md", "LICENSE", ".gitignore"):
        tree.write(name, (ROOT / name).read_text())

    def git(*words):
        subprocess.run(["git", *words], cwd=tree.folder, env=os.environ | GIT, check=True, capture_output=True)

    git("init", "--quiet")
    for k in range(2):
        tree.write("CHANGELOG.md", f"{k}\n")
        git("add", "--all")
        git("commit", "--quiet", "--message", str(k))
    done = asv_at_home(tree.folder, tmp_path / "home", "continuous", "HEAD~1", "HEAD", "--bench", ONE_CELL)
    assert "BENCHMARKS NOT SIGNIFICANTLY CHANGED" in done.stdout or "PERFORMANCE" in done.stdout, (
        done.stdout + done.stderr
    )
    results = list((tree.folder / "results" / "asv").glob("*/*-virtualenv-*.json"))
    assert len(results) == 2
    for path in results:
        found = Results.load(str(path))
        samples = found.get_result_samples("brusselator.rhs.track_derivative", [["'numba/adjoint'"], ["'small'"]])
        assert len(samples[0]) == 7 and max(samples[0]) < 1e-2
