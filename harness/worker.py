"""The worker: one fresh process a cell, started as `python -m harness.worker SPEC.json OUT.jsonl`.

It runs in the interpreter of the backend's environment, so it needs NumPy and the standard library only. It writes one
line a stage to OUT, so that the parent knows where a crashed or hanging cell was, and the result last.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time


def main(spec_path: str, out_path: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # PR_SET_PDEATHSIG: to die with a parent that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with open(spec_path) as f:
        spec = json.load(f)
    os.sched_setaffinity(0, spec["cpus"])  # before any import starts a thread pool
    with open(out_path, "a", buffering=1) as out:

        def stage(name):
            out.write(json.dumps({"stage": name, "at": time.time()}) + "\n")

        stage("import")
        try:
            import harness.cell_protocol as protocol

            result = protocol.MODES[spec["mode"]](spec, stage)
        except BaseException as e:
            result = failure(e)
        out.write(json.dumps({"result": finite(result)}, allow_nan=False) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries take up to 0.7 s to tear themselves down, for nobody


GAVE_UP = (  # what solvers say who are not ours: diffrax, CVODES and IDAS, torchdiffeq
    "The maximum number of solver steps was reached",
    "TOO_MUCH_WORK",
    "TOO_MUCH_ACC",
    "CONV_FAIL",
    "ERR_FAIL",
    "underflow in dt",
)


def failure(e: BaseException) -> dict:
    """The status of an exception and its sentence."""
    said = " ".join(f"{type(e).__name__}: {e}".split())[:400]
    if (
        isinstance(e, MemoryError)
        or "RESOURCE_EXHAUSTED" in said
        or "can't allocate memory" in said
        or "out of memory" in said
    ):
        return {"status": "oom", "reason": f"Memory ran out: {said}"}
    if gave_up := next((words for words in GAVE_UP if words in str(e)), ""):
        return {"status": "diverged", "reason": f"The solver gave up (`{gave_up}`); give a larger rtol or atol."}
    if type(e).__name__ in ("Invalid", "Wrong", "Diverged", "Timeout", "Unavailable"):
        return {"status": type(e).__name__.lower(), "reason": " ".join(str(e).split()), **vars(e).get("result", {})}
    return {"status": "error", "reason": said}


def finite(value):
    """Strict JSON: what is not finite is null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value


if __name__ == "__main__":
    main(*sys.argv[1:])
