"""The repository as its user meets it: names that are ours alone, one lock, and commands that exist."""

import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

from conftest import ROOT

from harness import ledger
from harness.cells import SIZES, backend, backends, cell, cells
from reports import tables, words

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))
PIN = r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+(\s*;.*)?"
OURS = [pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return [line for line in lines if line]


def test_no_other_distribution_owns_one_of_our_top_level_names():
    owners = packages_distributions()
    assert set(OURS) == {"problems", "backends", "harness", "reports"}
    for name in OURS:
        assert (ROOT / name).is_dir()
        assert set(owners.get(name, [])) <= {PROJECT["project"]["name"]}, f"{name} belongs to {owners[name]} too"


def test_no_module_is_named_like_a_library():
    """jax.py would import itself when it is run as a script."""
    known = {name for name in packages_distributions() if name not in OURS}
    for folder in OURS:
        for path in (ROOT / folder).rglob("*.py"):
            libraries = {
                "numpy",
                "scipy",
                "jax",
                "torch",
                "numba",
                "asv",
                "pandas",
                "matplotlib",
                "pydantic",
                "typer",
                "rich",
            }
            assert path.stem not in known & libraries, path
            assert path.stem not in libraries, path


def test_the_lock_pins_everything_exactly_and_once():
    names = []
    for line in pins():
        assert re.fullmatch(PIN, line), line
        names.append(normal(line.partition("==")[0]))
    assert len(set(names)) == len(names)


def test_every_dependency_is_in_the_lock():
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {normal(line.partition("==")[0]) for line in pins()}
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
        if name == project["name"]:
            continue  # its own extras
        assert normal(name) in names, f"{name} is not in constraints.txt"


def test_what_a_backend_requires_is_in_the_lock():
    """In ours, or in that of its own environment; both pin exactly and once."""
    for library in map(backend, backends()):
        lock = pins() if library.env == "main" else library.pins
        assert all(re.fullmatch(PIN, line) for line in lock), library
        names = [normal(line.partition("==")[0]) for line in lock]
        assert {normal(name) for name in library.requires} <= set(names) and len(set(names)) == len(names), library


def test_torch_is_exact():
    """Any later release would pull several GB of CUDA."""
    assert "torch==2.13.0" in pins() and "torch==2.13.0" in PROJECT["project"]["dependencies"]


def test_it_is_an_application():
    project = PROJECT["project"]
    assert "Private :: Do Not Upload" in project["classifiers"]
    assert project["scripts"]["adphys"] == "harness.cli:main"


def test_ci_runs_the_readmes_test_command():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert {"bench", "test"} <= TARGETS


def test_the_commands_of_the_readme_exist():
    """In its code, indented or in backquotes: every make target, every command, every address."""
    text = (ROOT / "README.md").read_text()
    code = re.findall(r"^ {4}(\S.*?)(?: {2,}.*)?$|`([^`\n]+)`", text, re.M)
    words = [shlex.split(indented or quoted, comments=True) for indented, quoted in code if "'" not in quoted]
    makes = {w[1] for w in words if w[:1] == ["make"] and len(w) > 1}
    assert {"bench", "test"} <= makes <= TARGETS
    done = subprocess.run([sys.executable, "-m", "harness", "--help"], cwd=ROOT, capture_output=True, text=True)
    commands = set(re.findall(r"^  ([a-z][a-z-]+)  ", done.stdout.partition("Commands")[2], re.M))
    assert {"list", "run", "gradient", "show", "report", "export-asv"} <= commands
    ours = [w[1:] for w in words if w and w[0].rpartition("/")[2] == "adphys" and len(w) > 1 and w[1].islower()]
    assert ours and {w[0] for w in ours} <= commands
    for command, *rest in ours:
        if command == "gradient":
            cell(rest[0])
        elif command == "list" and rest:
            assert list(cells(rest[0]))
    for name in set(re.findall(r"\]\((?!https?:)([^)#\s]+)", text)):
        assert (ROOT / name).exists(), f"README.md links to {name}"


def test_make_reads_every_rule():
    for target in sorted(TARGETS - {"bench", "test"}) + ["bench", "test"]:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_numbers_of_the_readmes_table_are_those_of_the_committed_ledgers():
    listed = subprocess.run(["git", "ls-files", "results/ledger/*.jsonl"], cwd=ROOT, capture_output=True, text=True)
    rows = tables.frame([ledger.Run(ROOT / path) for path in sorted(listed.stdout.split())])
    rows = rows.loc[(rows.device == "cpu") & (rows.dtype == "float64") & (rows.threads == 1)]
    lines = re.findall(r"^\| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    head, *body = [line.split(" | ") for line in lines]
    assert head[:3] == ["task", "size", "hand adjoint"] and {name for name, *_ in body} == set(rows.task)
    for task, size, hand, *ratios in body:
        here = rows.loc[(rows.task == task) & (rows.axis + " = " + rows.axis_value.map("{:g}".format) == size)]
        here = here.loc[here["size"].isin(SIZES)].set_index("way")
        assert words.seconds(here.derivative_median_s["numba/adjoint"]) == hand
        for way, shown in zip(head[3:], ratios, strict=True):
            assert words.ratio(here.derivative_over_adjoint.get(way)) == shown, f"{task}, {size}, {way}"
