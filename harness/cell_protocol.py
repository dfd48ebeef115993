"""The protocol of a cell (design: measurement, section 1): what happens inside a worker, in this order.

Import, first call, correctness, memory (the warm-up), calibration and samples, primal, correctness again, inputs intact.
NumPy and the standard library only.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from harness import judge
from problems import Implementation, structure

SAMPLE_S = 5e-3  # the least length of a sample (ADBench's rule: double the calls until it is measurable)
MOST_SAMPLES = 100
MOST_BUDGETS = 10  # no further sample once they have taken so many: of a call of half a minute one is enough


class Invalid(Exception):
    """A rule of measurement was broken."""


class Wrong(Exception):
    """The loss or the gradient is not right. `result` holds what was found, so that it can be published."""

    def __init__(self, sentence: str, result: dict):
        super().__init__(sentence)
        self.result = result


class Timeout(Exception):
    """It cannot end within the limit."""


class Unavailable(Exception):
    """The library or the device is absent."""


# The modes of a worker


def measure(spec: dict, stage: Callable[[str], None]) -> dict:
    """One process of a cell: everything that its record holds."""
    task, size, theta, data = load_inputs(spec)
    backend = construct(spec)
    implementation = load_statement(spec, backend) if spec.get("as_is") else load_implementation(spec)
    on = tuple({name: backend.put(a.copy()) for name, a in arrays.items()} for arrays in (theta, data))

    stage("first call")
    if each := backend.entrywise.get(spec["strategy"]):
        check_affordable(bind(implementation.loss, size, None), on[0], on[1], each, spec)
    began = time.perf_counter()
    derivative, work = prepared(backend, implementation, spec["strategy"], size, theta, data)
    out = backend.wait(derivative(*on))
    first_call = time.perf_counter() - began

    stage("correctness")
    check_device(backend, out, spec["device"])
    loss, gradient = fetch(backend, out)
    check_types(loss, gradient, theta, spec)
    result = check_gradient(loss, gradient, theta, spec) | {"first_call_s": first_call}
    if not spec["budget_s"]:
        check_intact(backend, on, (theta, data))
        return result | {"status": "ok"}

    step = lambda: backend.wait(derivative(*on))  # noqa: E731 - the whole of what is timed
    del out
    with turn(spec):
        stage("memory")
        result["memory"], out, warm = memory(step, work, backend)  # which is the warm-up too
        check_waited(backend, step, out, warm["wall"])
        stage("samples")
        result["derivative"] = sample(step, spec["budget_s"], spec["least"], warm)
    check_unchanged(backend, step() if warm["wall"] < spec["budget_s"] else out, gradient, spec)

    stage("primal")
    began = time.perf_counter()
    run, ran = primal_of(backend, implementation, spec["strategy"])
    primal = run(bind(ran, size, work))
    value = backend.wait(primal(*on))
    result["primal_first_call_s"] = time.perf_counter() - began
    off = judge.loss_error(float(number(backend, value)), float(loss), theta, gradient)
    if off > spec["loss_gate"]:
        raise Invalid(
            f"The primal that is timed differs from the loss of the derivative by {off:.1e}: they run different code."
        )
    call = lambda: backend.wait(primal(*on))  # noqa: E731
    with turn(spec):
        result["primal"] = sample(call, spec["budget_s"] / 2, spec["least"], once(call))

    stage("inputs")
    check_intact(backend, on, (theta, data))
    if implementation.stats:
        result["stats"] = {key: float(value) for key, value in implementation.stats(*on, size).items()}
    measured = (
        first_call
        + warm["wall"]
        + result["derivative"]["spent_s"]
        + result["primal_first_call_s"]
        + result["primal"]["spent_s"]
    )
    return result | {
        "status": "ok",
        "versions": backend.versions(),
        "measured_s": measured,
    }


def inputs(spec: dict, stage: Callable[[str], None]) -> dict:
    """Theta and data of the statement, saved to `spec["save"]`."""
    task, size = load_task(spec)
    both = zip(("theta ", "data  "), task.inputs(size), strict=True)
    save(spec["save"], {kind + name: np.asarray(a) for kind, arrays in both for name, a in arrays.items()})
    return {"status": "ok"}


def gradient(spec: dict, stage: Callable[[str], None]) -> dict:
    """Loss and gradient at every size of `spec["sizes"]`, each saved to its `save`: what references are made of."""
    backend = construct(spec)
    implementation = load_implementation(spec)
    if spec["backend"] != "numpy":
        backend.keep_compiled(implementation_module(spec), spec["code"])
    stage("first call")
    for job in spec["sizes"]:
        task, size, theta, data = load_inputs(spec | job)
        derivative, _ = prepared(backend, implementation, spec["strategy"], size, theta, data)
        save_gradient(job["save"], *fetch(backend, derivative(theta, data)))
    return {"status": "ok"}


def exact(spec: dict, stage: Callable[[str], None]) -> dict:
    """Loss and gradient of the solution itself, saved to `spec["save"]`."""
    task, size, theta, data = load_inputs(spec)
    stage("first call")
    save_gradient(spec["save"], *task.exact(theta, data, size))
    return {"status": "ok"}


def along_directions(spec: dict, stage: Callable[[str], None]) -> dict:
    """The statement's derivatives along the judge's directions, saved to `spec["save"]`."""
    task, size, theta, data = load_inputs(spec)
    stage("first call")
    loss = bind(next(iter(task.forms.values())), size, None)
    found = judge.directional(loss, theta, data, h=spec.get("h"))
    save(
        spec["save"],
        {"loss": np.float64(loss(theta, data))} | {f"along {name}": along for name, along in found.items()},
    )
    return {"status": "ok"}


def triad(spec: dict, stage: Callable[[str], None]) -> dict:
    """The bandwidth floor: a = b + s c over arrays of spec["size"] doubles in Numba, beside a plain copy."""
    from numba import njit

    @njit(fastmath=True)
    def kernel(a, b, s, c):
        for i in range(a.size):
            a[i] = b[i] + s * c[i]

    a, b, c = (np.full(spec["size"], float(k)) for k in range(3))
    stage("first call")
    kernel(a, b, 0.5, c)
    stage("samples")
    found, copy = (
        sample(call, spec["budget_s"], 10, once(call))
        for call in (lambda: kernel(a, b, 0.5, c), lambda: np.copyto(a, b))
    )
    return {"status": "ok", "triad": found, "copy": copy, "bytes": a.nbytes}


MODES = {
    "measure": measure,
    "inputs": inputs,
    "gradient": gradient,
    "exact": exact,
    "directions": along_directions,
    "triad": triad,
}


# Loading


def load_task(spec: dict) -> tuple[Any, Any]:
    """(task, size)."""
    task = importlib.import_module(f"problems.{spec['problem']}").TASKS[spec["task"]]
    return task, task.at(**spec["size"])


def load_inputs(spec: dict) -> tuple[Any, Any, dict, dict]:
    """(task, size, theta, data), the arrays in the cell's dtype."""
    task, size = load_task(spec)
    with np.load(spec["inputs"]) as arrays:
        both = {kind: {n[6:]: arrays[n] for n in arrays.files if n[:6] == kind} for kind in ("theta ", "data  ")}
    cast = lambda a: a.astype(spec["dtype"]) if a.dtype.kind == "f" else a  # noqa: E731
    theta, data = ({name: cast(a) for name, a in both[kind].items()} for kind in ("theta ", "data  "))
    return task, size, theta, data


def construct(spec: dict) -> Any:
    try:
        return importlib.import_module(f"backends.{spec['backend']}_backend").BACKEND(spec["device"])
    except (ImportError, RuntimeError) as e:
        raise Unavailable(f"{spec['backend']} cannot be used on {spec['device']}: {e}") from None


def load_implementation(spec: dict) -> Implementation:
    if spec["backend"] == "numpy":
        forms = importlib.import_module(f"problems.{spec['problem']}").TASKS[spec["task"]].forms
        return Implementation(forms[spec["form"]])
    return implementation_module(spec).IMPLEMENTATION[spec["task"]][spec["form"]]


def implementation_module(spec: dict) -> ModuleType:
    return importlib.import_module(f"problems.{spec['problem']}.{spec['problem']}_{spec['backend']}")


def load_statement(spec: dict, backend: Any) -> Implementation:
    """A form of the statement as it is, in a copy of its module."""
    module, file = ModuleType("statement"), importlib.import_module(f"problems.{spec['problem']}").__file__
    exec(compile(Path(file or "").read_text(), file or "", "exec"), vars(module))
    return Implementation(backend.as_is(module, module.TASKS[spec["task"]].forms[spec["form"]]))


def prepared(
    backend: Any, implementation: Implementation, strategy: str, size: Any, theta: dict, data: dict
) -> tuple[Callable, Any]:
    """derivative(theta, data) of a strategy, and the `work` that it holds."""
    work = implementation.prepare(structure(theta, data), size) if implementation.prepare else None
    given = implementation.strategies.get(strategy)
    method = getattr(backend, strategy)
    if given:  # what the backend does by itself would be done twice
        method = getattr(backend, f"{strategy}_given", method)
    return method(bind(given or implementation.loss, size, work)), work


def primal_of(backend: Any, implementation: Implementation, strategy: str) -> tuple[Callable, Callable]:
    """(the backend's way of running it, the loss) as the strategy runs them: usually the plain ones."""
    given = implementation.strategies.get(strategy)
    if given and hasattr(backend, f"{strategy}_given"):
        return backend.primal, given
    if own := getattr(backend, f"{strategy}_primal", None):
        return own, given or implementation.loss
    return backend.primal, implementation.loss


def bind(function: Callable, size: Any, work: Any) -> Callable:
    """loss(theta, data): size and work are static. What was bound stays in sight, for who reads source code: `of`, `static`."""
    bound: Any = (
        (lambda theta, data: function(theta, data, size))
        if work is None
        else (lambda theta, data: function(theta, data, size, work))
    )
    bound.of, bound.static = function, (size,) if work is None else (size, work)
    return bound


def fetch(backend: Any, out: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    loss, blocks = out
    return number(backend, loss), {name: number(backend, block) for name, block in blocks.items()}


def number(backend: Any, x: Any) -> np.ndarray:
    """A copy in NumPy; compiled code may return Python floats for scalars."""
    return np.array(x if isinstance(x, float) else backend.get(x))


def save_gradient(path: str, loss: Any, blocks: dict) -> None:
    save(path, {"loss": loss} | {f"block {name}": block for name, block in blocks.items()})


def save(path: str, arrays: dict) -> None:
    part = f"{path}.{os.getpid()}.{threading.get_ident()}"  # another run, or thread, may be making the same
    with open(part, "wb") as f:
        np.savez(f, **arrays)
    os.replace(part, path)


# Rules of measurement


def check_affordable(loss: Callable, theta: dict, data: dict, each: tuple[type, int], spec: dict) -> None:
    """The loss, which compiles nothing, is run so often for each entry of theta, in such numbers: two runs tell whether the
    limit would break. They stand before the clock of the first call, because they are the harness's own."""
    number, runs = each
    at = {name: block + number(0) for name, block in theta.items()}
    took = min(clock(lambda: loss(at, data), 1)[0] for _ in range(2))
    entries = sum(block.size for block in theta.values())
    if entries * runs * took > spec.get("limit_s", math.inf):
        raise Timeout(
            f"Not run: one {number.__name__} primal takes {took:.2g} s, and each of the {entries} entries of theta needs "
            f"{runs}; the limit is {spec['limit_s']:.0f} s"
        )


def check_waited(backend: Any, step: Callable, out: Any, took: float) -> None:
    """When the clock stopped the result was there: reading it first costs no more than reading it again.

    A preemption can look like a wait, so it must happen three times running.
    """
    reading = again = 0.0
    for _ in range(3):
        times = [time.perf_counter()]
        for _ in range(2):
            fetch(backend, out)
            times.append(time.perf_counter())
        reading, again = np.diff(times)
        if reading - again <= max(0.3e-3, 0.2 * took):
            return
        took = time.perf_counter()
        out = step()
        took = time.perf_counter() - took
    raise Invalid(
        f"The result was not waited for: reading it took {reading:.1e} s after the clock had stopped, "
        f"reading it again {again:.1e} s."
    )


def check_device(backend: Any, out: Any, device: str) -> None:
    """Raises Invalid where a gradient lies elsewhere; a scalar may come as a plain number."""
    for name, block in out[1].items():
        if not isinstance(block, float | np.generic) and (found := backend.where(block)) != device:
            raise Invalid(f"The gradient of {name} came back on {found}; the cell asks for {device}.")


def check_types(loss: Any, gradient: dict, theta: dict, spec: dict) -> None:
    if gradient.keys() != theta.keys():
        raise Invalid(f"The gradient has the blocks {', '.join(gradient)}; theta has {', '.join(theta)}.")
    for name, block in gradient.items():
        if block.shape != theta[name].shape:
            raise Invalid(f"The gradient of {name} has the shape {block.shape}; theta has {theta[name].shape}.")
        if block.ndim and str(block.dtype) != spec["dtype"]:
            raise Invalid(f"The gradient of {name} is {block.dtype}; the cell asks for {spec['dtype']}.")
    if np.ndim(loss) or (str(loss.dtype) not in (spec["dtype"], "float64")):
        raise Invalid(
            f"The loss has the shape {np.shape(loss)} and dtype {loss.dtype}; it must be one {spec['dtype']} number."
        )


def check_gradient(loss: Any, gradient: dict, theta: dict, spec: dict) -> dict:
    """Errors of every block against the references of the spec. Raises Wrong, with what was found."""
    source = np.load(spec["whole"] or spec["along"])
    blocks, worst = {}, 0.0
    for name in theta:
        g = gradient[name]
        whole = source[f"block {name}"] if spec["whole"] else None
        along = None if spec["whole"] else source[f"along {name}"]
        off = judge.error(g, whole, along, name)
        worst = max(worst, off)
        norm, nonzero = judge.extent(whole, along, g.size)
        blocks[name] = {
            "size": int(g.size),
            "norm": float(np.linalg.norm(g)),
            "dot_gold5": judge.gold_dot(g),
            "error": off,
            "reference_norm": norm,
            "reference_nonzero": nonzero,
        }
    off = judge.loss_error(float(loss), float(source["loss"]), theta, gradient)
    result = {"loss": float(loss), "loss_error": off, "blocks": blocks, "error": worst}
    for name, block in blocks.items():
        if not np.isfinite(block["norm"]):
            raise Wrong(f"The gradient of {name} is not finite.", result)
        if block["reference_norm"] == 0.0:
            raise Invalid(
                f"The reference gradient of {name} is zero at this size: it can check nothing. Choose another size."
            )
        if block["error"] > spec["gate"]:
            how = "is zero" if block["norm"] == 0.0 else f"has the relative error {block['error']:.1e}"
            raise Wrong(
                f"The gradient of {name} {how}, above the gate {spec['gate']:.0e}; judged by {spec['judge']}.", result
            )
    if not off <= spec["loss_gate"]:
        raise Wrong(f"The loss has the relative error {off:.1e}, above the gate {spec['loss_gate']:.0e}.", result)
    return result


def check_intact(backend: Any, on: tuple[dict, ...], pristine: tuple[dict, ...]) -> None:
    """The inputs hold what they held before the first call."""
    for given, before in zip(on, pristine, strict=True):
        for name, array in before.items():
            if not np.array_equal(backend.get(given[name]), array):
                raise Invalid(f"The input {name} was changed by the call.")


def check_unchanged(backend: Any, out: Any, gradient: dict, spec: dict) -> None:
    """The artefact that was timed still returns what was checked."""
    _, again = fetch(backend, out)
    for name, block in gradient.items():
        if np.linalg.norm(again[name] - block) > spec["gate"] * np.linalg.norm(block):
            raise Invalid(f"The gradient of {name} changed between the first call and the last.")


# Clock and memory


@contextlib.contextmanager
def turn(spec: dict) -> Iterator[None]:
    """Of the cells that run side by side one at a time takes samples; a worker that dies gives its turn back."""
    with open(spec["turn"], "w") if "turn" in spec else contextlib.nullcontext() as file:
        if file:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reference_kernel(a=np.linspace(0.1, 1.0, 4096)) -> float:  # noqa: B008 - one array, made once
    """Fixed work of about 0.4 ms, timed beside every sample: what the machine itself was doing.

    NumPy, not Numba, so that a worker of any environment runs the same code without importing a second library.
    """
    began = time.perf_counter()
    for _ in range(16):
        np.sqrt(np.exp(a)).sum()
    return time.perf_counter() - began


def sample(call: Callable, budget: float, least: int, warm: dict) -> dict:
    """Wall and CPU seconds a call, and the reference kernel's beside them, until the budget is spent.

    `warm` is the call that warmed up. Where it alone breaks the budget it is the first of the samples, `least` in all,
    or fewer where they take MOST_BUDGETS.
    """
    start, spent = time.perf_counter(), 0.0
    number, took = 1, warm["wall"]
    found: dict[str, list] = {name: [] for name in warm}
    if took < budget:
        target = max(SAMPLE_S, budget / MOST_SAMPLES)
        # doubling (ADBench's rule), but near to the target at once; the less of two, because one may have been preempted
        while (took := min(took, clock(call, number)[0])) < target:
            number = max(2 * number, int(number * target / max(took, 1e-7) / 4))
            took = clock(call, number)[0]
    else:
        found, spent = {name: [value] for name, value in warm.items()}, took
    gc.collect()
    gc.disable()
    try:
        while (len(found["wall"]) < least and spent < MOST_BUDGETS * budget) or (
            took < budget > time.perf_counter() - start and len(found["wall"]) < MOST_SAMPLES
        ):
            for name, value in once(call, number).items():
                found[name].append(value)
            spent += number * found["wall"][-1]
    finally:
        gc.enable()
    return found | {"number": number, "spent_s": time.perf_counter() - start}


def once(call: Callable, number: int = 1) -> dict:
    """One sample: the reference kernel, then seconds a call of `number` calls."""
    reference = reference_kernel()
    wall, cpu = clock(call, number)
    digits = lambda t: float(f"{t:.6g}")  # noqa: E731 - the clock has no more, and the ledger keeps them all
    return {"wall": digits(wall / number), "cpu": digits(cpu / number), "reference": digits(reference)}


def clock(call: Callable, number: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(number):
        call()
    return time.perf_counter() - wall, time.process_time() - cpu


def memory(step: Callable, work: Any, backend: Any) -> tuple[dict, Any, dict]:
    """Bytes that one call adds at its peak and what `work` holds; the call's result, and its times as those of a sample.

    The peak is null where the kernel does not say (not Linux).
    """
    gc.collect()
    backend.device_memory()
    before = None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else freed pages that stay mapped hide what the call needs
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # resets the high-water mark
        before = status_bytes("VmRSS")
    out = []
    found = once(lambda: out.append(step()))
    peak = None if before is None else status_bytes("VmHWM") - before
    return {"peak": peak, "work": held(work), "device": backend.device_memory()}, out[0], found


def status_bytes(key: str) -> int:
    with open("/proc/self/status") as f:
        return int(re.findall(rf"{key}:\s*(\d+) kB", f.read())[0]) * 1024


def held(work: Any) -> int:
    """Bytes of the arrays in `work`, however nested."""
    if hasattr(work, "nbytes"):
        return int(work.nbytes)
    if isinstance(work, dict):
        return sum(held(item) for item in work.values())
    return sum(held(item) for item in work) if isinstance(work, list | tuple) else 0
