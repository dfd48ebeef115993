"""The whole cross product at tiny, and sizes that nobody listed: every cell is ok, or says why not and is believed only then."""

import re

import pytest
from conftest import PLAIN, is_sentence

from harness.cells import cell, cells, known_status
from harness.measure import attempt, measure

TINY = list(cells("*@tiny"))
# Odd numbers, other parameters: where indices and defaults go wrong. A new problem may add some, and needs none.
ODD = {
    "brusselator.rhs": ("N=9,alpha=0.1", "N=12,A=2.9,B=1.3,t=0.5"),
    "brusselator.imex": ("N=7,T=1.2,dt=0.02,alpha=0.1", "N=12,T=0.6,save=0.2,dt=0.01,A=2.9,B=1.3"),
    "neural_ode.rhs": ("H=7", "H=1"),
    "neural_ode.rk4": ("H=13,m=3,b=3", "H=6,b=2"),
    "shallow_ice.rhs": ("N=11", "N=20,A=1e-17"),
    "shallow_ice.ude": ("N=12,years=2,spy=3", "N=17,years=1"),
    "sparse_loss.fem_matvec": ("m=7,q=3", "m=10,q=5"),
    "sparse_loss.fem_solve": ("m=7,q=3", "m=10,q=5"),
}


def quickly(c):
    """As a run would, only shorter: every check of the protocol is made."""
    return measure(c, budget=0.01, number=1, limit=120.0, least=1)


@pytest.mark.parametrize("c", TINY, ids=lambda c: c.address)
def test_every_cell_is_ok_or_says_why_not(c):
    record = quickly(c)
    if record.status == "unsupported":
        is_the_error_that_was_declared(c, record.reason)
    elif record.status in ("missing", "unavailable"):
        is_sentence(record.reason)
        assert record.processes == []
    else:
        assert record.status == "ok", record.reason
        assert record.error is not None and record.error <= record.gate
        assert len(record.processes) == 1


# the measure of all others at both, the others at one each
AT = {"numba/adjoint": (0, 1), "jax/reverse": (0,), "torch/reverse": (1,), "enzyme/reverse": (0,)}


@pytest.mark.parametrize(
    "address", [f"{task}/{way}@{sizes[k]}" for task, sizes in ODD.items() for way, at in AT.items() for k in at]
)
def test_sizes_that_nobody_listed(address):
    c = cell(address)
    if known_status(c)[0] == "unavailable":
        pytest.skip(known_status(c)[1])
    record = quickly(c)
    assert record.status == "ok", record.reason
    assert record.error is not None and record.error <= record.gate


# An author who says `unsupported` is believed when the attempt fails with the error that his sentence quotes


def is_the_error_that_was_declared(c, reason):
    """The sentence quotes the error in backquotes, as in `NotImplementedError: no rule for svd`."""
    quoted = re.findall(r"`([^`]+)`", is_sentence(reason))
    assert quoted, f"{c.address} is unsupported; quote the error of the attempt in backquotes."
    status, said = attempt(c, 120.0)
    assert status in ("error", "crashed", "invalid", "oom", "timeout"), (
        f"{c.address} is declared unsupported, and is {status}."
    )
    assert any(part in said for part in quoted), f"{c.address}: the attempt said {said}"


@pytest.mark.parametrize(
    "sentence, holds",
    [
        ("Plain has no forward mode (`NotImplementedError: plain has no forward mode`).", True),
        ("Plain has no forward mode (`ValueError`).", False),
        ("Plain has no forward mode.", False),
    ],
)
def test_an_attempt_shows_whether_the_sentence_is_true(tree, sentence, holds):
    tree.write("backends/plain_backend.py", PLAIN)
    code = f"""
from problems import Implementation
from problems.brusselator import rhs
IMPLEMENTATION = {{"rhs": {{"array": Implementation(rhs, unsupported={{"forward": {sentence!r}}})}}}}
"""
    tree.write("problems/brusselator/brusselator_plain.py", code)
    script = f"""
import sys
sys.path[:0] = [{str(__file__.rpartition("/")[0])!r}]
from harness.cells import cell
from harness.measure import measure
from test_conformance import is_the_error_that_was_declared
c = cell("brusselator.rhs/plain/forward@tiny")
record = measure(c, budget=0.01, number=1, limit=60.0)
assert record.status == "unsupported" and record.reason == {sentence!r} and record.processes == []
try:
    is_the_error_that_was_declared(c, record.reason)
    print("holds")
except AssertionError as e:
    print(e)
"""
    done = tree.python("-c", script)
    assert (done.stdout.strip() == "holds") == holds, done.stdout + done.stderr
