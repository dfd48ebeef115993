"""A backend in an environment of its own: another interpreter, its lock, the record, and the sentence where it is absent.

Nothing is downloaded: what the environment installs is a wheel written here.
"""

import importlib.util
import json
import os
import subprocess
import sysconfig
import zipfile

import pytest
from conftest import PLAIN, ROOT, is_refusal, is_sentence
from test_extend import PENDULUM, SWING_TOY

from harness.cells import backend
from harness.environments import is_made, python

GUEST = (
    PLAIN.replace('("numpy",)', '("guest-lib", "numpy")\n    env = "attic"\n    pins = ("guest-lib==1.0",)')
    .replace("        pass", "        import guest_lib")
    .replace("Plain", "Guest")
)
CELL = "pendulum.swing/guest/adjoint@tiny"


@pytest.fixture
def guests(tree, tmp_path, monkeypatch):
    """A tree with a cache of its own, a backend in the environment `attic`, and its one library as a wheel."""
    tree.cache = tmp_path / "cache"
    tree.write("backends/guest_backend.py", GUEST)
    tree.write("problems/pendulum/__init__.py", PENDULUM)
    tree.write("problems/pendulum/pendulum_guest.py", SWING_TOY)
    with zipfile.ZipFile(tmp_path / "guest_lib-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("guest_lib.py", "")
        info = {
            "METADATA": "Metadata-Version: 2.1\nName: guest_lib\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, text in info.items():
            wheel.writestr(f"guest_lib-1.0.dist-info/{name}", text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tree


def made(tree):
    rows = tree.adphys("env", "list").stdout.splitlines()
    return {words[0]: words[1] for words in map(str.split, rows[1:])}["attic"]


def lend_numpy(tree):
    """The environment has no NumPy of its own; a path file lends it that of the tests."""
    (place,) = (tree.cache / "envs" / "attic").glob("lib/python*/site-packages")
    (place / "lent.pth").write_text(sysconfig.get_path("purelib"))


def test_a_cell_runs_in_the_environment_that_its_backend_names(guests):
    assert importlib.util.find_spec("guest_lib") is None
    for words in (["gradient", CELL], ["run", CELL]):
        done = guests.adphys(*words)
        assert done.returncode == 2 and "adphys env create attic" in is_sentence(done.stderr.splitlines()[-1])
    assert made(guests) == "no"

    done = guests.adphys("env", "create", "attic")
    assert (done.returncode, made(guests)) == (0, "yes") and "envs/attic" in done.stdout, done.stderr
    (found,) = json.loads(guests.adphys("list", CELL, "--json").stdout)
    assert found["status"] == "unavailable" and "numpy" in found["reason"]  # there, whatever is installed here
    lend_numpy(guests)
    (record,) = guests.measure(CELL)
    assert (record["status"], record["env"]) == ("ok", "attic"), record["reason"]
    assert record["versions"]["guest-lib"] == "1.0"
    (other,) = guests.measure("pendulum.swing/numpy/complex_step@tiny")
    assert other["env"] == "main"

    guests.edit("backends/guest_backend.py", "guest-lib==1.0", "guest-lib==1.1")
    (stale,) = guests.measure(CELL)
    assert stale["status"] == "unavailable" and "up to date" in is_sentence(stale["reason"])
    assert stale["key"] != record["key"] and made(guests) == "no"
    said = is_refusal(guests.adphys("env", "create", "attic"))
    assert "guest-lib==1.1" in said
    assert made(guests) == "no"


def test_an_environment_that_nobody_names_is_one_sentence(guests):
    said = is_refusal(guests.adphys("env", "create", "cellar"))
    assert "cellar" in said and "attic" in said


# What the implementations in DaCe say of it. Where its environment is not made nobody can try.

CUBE = """
import dace, sys
import numpy as np
from backends.dace_backend import BACKEND

@dace.program
def product(u, S):
    S[0] = np.sum(u * u * u)

@dace.program
def power(u, S):
    S[0] = np.sum(u**3)

theta = {"u": np.linspace(0.5, 1.5, 7).copy()}  # it takes no views
try:
    loss, gradient = BACKEND("cpu").reverse(lambda theta, data: globals()[sys.argv[1]])(theta, {})
    print(np.abs(gradient["u"] - 3 * theta["u"] ** 2).max() < 1e-13)
except AssertionError:
    print("AssertionError")
"""


@pytest.mark.parametrize("program, said", [("power", "True"), ("product", "AssertionError")])
def test_dace_reads_an_array_once_in_an_operation(program, said, tmp_path):
    if not is_made(backend("dace")):
        pytest.skip("the attempt needs the environment dace")
    file = tmp_path / "cube.py"  # DaCe reads the source of a program
    file.write_text(CUBE)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    words = [python(backend("dace")), str(file), program]
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [said], done.stderr
