"""Two promises: a problem in one file and a backend in one file, no list edited anywhere."""

import json

from conftest import PLAIN, is_sentence

PENDULUM = '''
"""The pendulum: q' = p, p' = -k sin q, by the symplectic Euler method; loss = energy at the end."""
from typing import NamedTuple
import numpy as np
from problems import Task

class Size(NamedTuple):
    steps: int
    dt: float = 0.01

def inputs(size):
    return {"start": np.array([1.0, 0.2]), "k": np.array(2.0)}, {}

def swing(theta, data, size):
    """The energy after all steps."""
    (q, p), k = theta["start"], theta["k"]
    for _ in range(size.steps):
        p = p - size.dt * k * np.sin(q)
        q = q + size.dt * p
    return p**2 / 2 - k * np.cos(q)

TASKS = {
    "swing": Task(
        size=Size,
        sizes={"tiny": Size(5), "small": Size(50), "large": Size(500)},
        inputs=inputs,
        forms={"array": swing},
        gate=1e-10,
        gate32=1e-5,
        axis="steps",
    )
}
'''

TOY = PLAIN.replace("class Plain", "class Toy").replace("BACKEND = Plain", "BACKEND = Toy")

SWING_TOY = '''
"""The pendulum in Toy: the discrete adjoint."""
import numpy as np
from problems import Implementation
from problems.pendulum import swing

def swing_adjoint(theta, data, size):
    (q, p), k, dt = theta["start"], float(theta["k"]), size.dt
    states = [(q, p)]
    for _ in range(size.steps):
        p = p - dt * k * np.sin(q)
        q = q + dt * p
        states.append((q, p))
    qb, pb, kb = k * np.sin(q), p, -np.cos(q)
    for q, p in reversed(states[:-1]):
        pb = pb + dt * qb
        kb = kb - dt * np.sin(q) * pb
        qb = qb - dt * k * np.cos(q) * pb
    return float(swing(theta, data, size)), {"start": np.array([qb, pb]), "k": np.array(kb)}

IMPLEMENTATION = {"swing": {"loops": Implementation(swing, strategies={"adjoint": swing_adjoint})}}
'''


def listed(tree, pattern):
    done = tree.adphys("list", pattern, "--json")
    assert done.returncode == 0, done.stderr
    return {c["cell"]: (c["status"], c["reason"]) for c in json.loads(done.stdout)}


def test_a_problem_in_one_file(tree):
    before = {file: file.read_bytes() for file in tree.folder.rglob("*.py")}
    tree.write("problems/pendulum.py", PENDULUM)
    found = listed(tree, "pendulum")
    assert [c for c, (status, _) in found.items() if status is None] == [
        f"pendulum.swing/numpy/{strategy}@{size}"
        for strategy in ("complex_step", "difference")
        for size in ("tiny", "small")
    ]
    assert {status for c, (status, _) in found.items() if "/numpy/" not in c} == {"missing"}  # invitations

    cells = [
        f"pendulum.swing/numpy/{way}"
        for way in ("complex_step@tiny", "difference@tiny", "complex_step@small", "difference@steps=7,dt=0.02")
    ]
    for record in tree.measure(*cells):
        assert record["status"] == "ok", record
        assert record["error"] < (1e-5 if record["strategy"] == "difference" else 1e-3)
        assert record["lines"] == 6 and record["judge"] != "the hand adjoint"
    said = tree.gradient("pendulum.swing/numpy/complex_step@tiny")
    assert (said["status"], said["code"], list(said["blocks"])) == ("ok", 0, ["start", "k"])
    assert "np.sin(q)" in tree.adphys("show", "pendulum.swing", "numpy").stdout
    assert before == {file: file.read_bytes() for file in before}


def test_a_backend_in_one_file(tree):
    before = {file: file.read_bytes() for file in tree.folder.rglob("*.py")}
    tree.write("problems/pendulum.py", PENDULUM)
    tree.write("backends/toy_backend.py", TOY)
    found = listed(tree, "*/toy")
    tasks = {c.partition("/")[0] for c in listed(tree, "@tiny")}
    ways = [f"{strategy}@{size}" for strategy in ("adjoint", "forward") for size in ("tiny", "small", "large")]
    assert set(found) == {f"{task}/toy/{way}" for task in tasks for way in ways}
    for cell, (status, reason) in found.items():
        task = cell.partition("/")[0]
        problem = task.partition(".")[0]
        assert status == "missing" and task in is_sentence(reason) and f"problems/{problem}/{problem}_toy.py" in reason

    said = tree.gradient("pendulum.swing/toy/adjoint@tiny")
    assert (said["status"], said["code"], said["loss"]) == ("missing", 1, None)

    (tree.folder / "problems" / "pendulum").mkdir()
    (tree.folder / "problems" / "pendulum.py").rename(tree.folder / "problems" / "pendulum" / "__init__.py")
    tree.write("problems/pendulum/pendulum_toy.py", SWING_TOY)
    found = listed(tree, "pendulum.swing/toy")
    assert [c for c, (status, _) in found.items() if status is None] == [f"pendulum.swing/toy/{way}" for way in ways]
    said = tree.gradient("pendulum.swing/toy/adjoint@tiny")
    assert (said["status"], said["code"]) == ("ok", 0) and said["error"] < 1e-13
    (record,) = tree.measure("pendulum.swing/toy/adjoint@steps=33")
    assert record["status"] == "ok" and record["form"] == "loops" and record["judge"].endswith("along directions")
    assert before == {file: file.read_bytes() for file in before}
