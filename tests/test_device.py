"""The device path without a device: a library whose arrays say where they are, whose calls return before they are done."""

import pytest
from conftest import is_sentence

FAR = '''
"""A device that is not there: arrays with a place, results that take 20 ms to arrive."""
import time
import numpy as np
from backends import Backend

class Array:
    def __init__(self, array, place, ready=False):
        self.array, self.place, self.ready = array, place, ready

class Far(Backend):
    requires = ("numpy",)
    devices = ("cpu", "cuda")

    def __init__(self, device):
        self.device, self.puts = device, 0

    def put(self, array):
        self.puts += 1
        assert self.puts <= 6, "inputs are put once"
        return Array(array, self.device, ready=True)

    def get(self, array):
        if not array.ready:
            time.sleep(0.02)
            array.ready = True
        return array.array

    def wait(self, result):
        loss = result[0] if isinstance(result, tuple) else result
        self.get(loss)
        for block in result[1].values() if isinstance(result, tuple) else ():
            block.ready = True
        return result

    def where(self, array):
        return array.place

    def device_memory(self):
        return None if self.device == "cpu" else 4096

    def primal(self, loss):
        return loss

    def adjoint(self, gradient):
        return gradient

BACKEND = Far
'''

RHS = """
import numpy as np
from backends.far_backend import Array
from problems import Implementation
from problems.brusselator import brusselator_numba as near

def arrays(far):
    return {name: a.array for name, a in far.items()}

def rhs(theta, data, size, work):
    return Array(np.float64(near.rhs(arrays(theta), arrays(data), size, work)), theta["u"].place)

def adjoint(theta, data, size, work):
    loss, blocks = near.rhs_adjoint(arrays(theta), arrays(data), size, work)
    place = theta["u"].place
    return Array(np.float64(loss), place), {k: Array(np.array(b, theta["u"].array.dtype), place) for k, b in blocks.items()}

IMPLEMENTATION = {"rhs": {"loops": Implementation(rhs, near.rhs_prepare, strategies={"adjoint": adjoint})}}
"""
CELL = "brusselator.rhs/far/adjoint@tiny,device=cuda"


@pytest.fixture
def far(tree):
    tree.write("backends/far_backend.py", FAR)
    tree.write("problems/brusselator/brusselator_far.py", RHS)
    return tree


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_cell_on_a_device(far, dtype):
    (record,) = far.measure(f"{CELL},dtype={dtype}")
    assert record["status"] == "ok", record["reason"]
    assert (record["device"], record["dtype"]) == ("cuda", dtype)
    assert record["processes"][0]["memory"]["device"] == 4096
    assert min(record["processes"][0]["derivative"]["wall"]) > 0.02  # the wait is inside the clock


def test_a_gradient_that_came_back_to_the_host(far):
    far.edit(
        "problems/brusselator/brusselator_far.py",
        'Array(np.array(b, theta["u"].array.dtype), place)',
        "Array(np.array(b), 'cpu')",
    )
    (record,) = far.measure(CELL)
    assert record["status"] == "invalid" and record["processes"] == []
    assert "came back on cpu" in is_sentence(record["reason"]) and "cuda" in record["reason"]


def test_a_device_that_was_not_waited_for(far):
    far.edit("backends/far_backend.py", "        self.get(loss)\n", "        return result\n")
    (record,) = far.measure(CELL)
    assert record["status"] == "invalid" and "not waited for" in is_sentence(record["reason"])


@pytest.mark.parametrize("way", ["jax/reverse", "torch/reverse"])
def test_a_device_that_is_not_there(far, way):
    (record,) = far.measure(f"brusselator.rhs/{way}@tiny,device=cuda")
    if record["status"] != "ok":  # where there is one, the cell is measured
        assert record["status"] == "unavailable" and "cuda" in is_sentence(record["reason"])
