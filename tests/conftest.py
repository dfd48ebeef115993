"""A tree of its own for tests that break things: a copy of the code, run as its user would, in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cells import backend, cells, modules
from harness.reference import code_folder

ROOT = Path(__file__).resolve().parents[1]

PLAIN = '''
"""A library that needs nothing and hides nothing: what an implementation does happens."""
import numpy as np
from backends import Backend

class Plain(Backend):
    requires = ("numpy",)

    def __init__(self, device):
        pass

    def put(self, array):
        return array

    def get(self, array):
        return np.asarray(array)

    def wait(self, result):
        return result

    def primal(self, loss):
        return loss

    def adjoint(self, gradient):
        return gradient

    def forward(self, loss):
        raise NotImplementedError("plain has no forward mode")

BACKEND = Plain
'''


def pytest_configure(config):
    """pytest -n: a processor for each, because every worker of the harness takes the last of those it is given."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(worker) % len(cpus)]})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """pytest -n: one process has all tests of a statement, and one all cells of a library, which is then imported once and
    compiles once; other tests go where there is room. (xdist's own groups do nothing under this pytest.)"""
    from xdist.scheduler import LoadScopeScheduling

    whole_files = {*modules("problems"), "enzyme"}

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            name = Path(file).stem.removeprefix("test_")
            if name in whole_files:
                return file
            if name == "conformance" and (library := re.search(r"\[\w+\.\w+/(\w+)", test)):
                return library[1]
            return nodeid

    config.option.loadscopereorder = False  # asv forks, which it may until a test of Enzyme has started JAX's threads
    return Together(config, log)


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """Hand adjoints that tests call themselves are compiled for all the tests of a suite."""
    for problem in modules("problems"):
        if module := sys.modules.get(f"problems.{problem}.{problem}_numba"):
            first = next(cells(f"{problem}.*/numba/adjoint@tiny"))
            backend("numba")("cpu").keep_compiled(module, str(code_folder(first, "numba")))


class Tree:
    """The code in a folder of its own, with the Brusselator as its only problem."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache
        skip = shutil.ignore_patterns("__pycache__", "published", "latest", "html")
        for name in ("harness", "backends", "reports", "problems/brusselator"):
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        for name in ("problems/__init__.py", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, folder / name)

    def write(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.folder / path).read_text()
        assert text.count(old) == 1, f"{path} has {text.count(old)} of: {old}"
        self.write(path, text.replace(old, new))

    def start(self, *words: str, **options) -> subprocess.Popen:
        """python, with this tree as its code."""
        environ = os.environ | {"ADPHYS_CACHE": str(self.cache), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen([sys.executable, *words], cwd=self.folder, env=environ, text=True, **pipes)

    def python(self, *words: str) -> subprocess.CompletedProcess:
        with self.start(*words) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def adphys(self, *words: str) -> subprocess.CompletedProcess:
        return self.python("-m", "harness", *words)

    def gradient(self, cell: str) -> dict:
        """What `gradient --json` says, and its exit code."""
        done = self.adphys("gradient", cell, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout) | {"code": done.returncode, "stderr": done.stderr}

    def measure(
        self, *cells: str, budget: float = 0.05, number: int = 1, limit: float = 60.0, least: int = 1
    ) -> list[dict]:
        """The records of cells, by harness.measure in one process."""
        code = f"""
from harness.cells import cell
from harness.measure import measure
for address in {cells}:
    record = measure(cell(address), budget={budget}, number={number}, limit={limit}, least={least})
    print(record.model_dump_json())
"""
        done = self.python("-c", code)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def ledgers(self) -> list[Path]:
        return sorted((self.folder / "results" / "ledger").rglob("*.jsonl"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """References are named by content, so that all trees of a session share them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tree(tmp_path, cache) -> Tree:
    return Tree(tmp_path / "tree", cache)


@pytest.fixture(scope="module")
def module_tree(tmp_path_factory, cache) -> Tree:
    """One tree for all the tests of a module that only read it."""
    return Tree(tmp_path_factory.mktemp("module") / "tree", cache)


def is_refusal(done: subprocess.CompletedProcess) -> str:
    """A user error: exit code 2, nothing on stdout, one line that is a sentence. Returns it."""
    assert (done.returncode, done.stdout) == (2, ""), (done.returncode, done.stdout, done.stderr)
    return is_sentence(done.stderr.removesuffix("\n"))


def is_sentence(text: str) -> str:
    assert "\n" not in text and "Traceback" not in text, text
    assert text[:1].strip() and text.endswith(".") and not text.endswith(".."), text
    return text
