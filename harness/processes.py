"""Worker processes: start one, watch it, say how it ended. A crash, a hang or a full memory is a status and a sentence."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from harness import ROOT

POLL_S = 0.02
REST = 10
MEMORY_SHARE = 0.85  # of what the machine has: beyond it the kernel would choose a victim, perhaps not ours
STOP = threading.Event()  # set when a run is interrupted: its other workers are killed, and no further one starts
resident: dict[int, int] = {}  # worker -> bytes, of those that run side by side


class Stopped(Exception):
    """The run was interrupted."""


def run(
    mode: str, spec: dict, environ: dict[str, str], threads: int, limit: float, python: str = sys.executable
) -> dict:
    """The result of one worker, always with `status` and `reason`; wall seconds as `wall_s`."""
    with tempfile.TemporaryDirectory(prefix="adphys-", ignore_cleanup_errors=True) as folder:
        spec_path, out_path, log = (Path(folder) / name for name in ("spec.json", "out.jsonl", "log"))
        spec_path.write_text(json.dumps({"mode": mode, "cpus": cpus(threads)} | spec))
        began = time.monotonic()
        if STOP.is_set():
            raise Stopped
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [python, "-m", "harness.worker", str(spec_path), str(out_path)],
                cwd=folder,  # with TMPDIR: what a compiler leaves behind goes when the worker goes, killed or not
                env=os.environ
                | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": folder}
                | thread_environ(threads)
                | environ,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                ended = _watch(process, out_path, limit)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                resident.pop(process.pid, None)
        found = _lines(out_path)
        said = " ".join(log.read_text(errors="replace").split()[-40:])
    result = found[-1].get("result") if found else None
    if result is None:
        stage = found[-1]["stage"] if found else "start"
        result = _ended(ended, stage, limit, process.returncode, said)
    places = rf"[^\s'\"]*/site-packages|{re.escape(folder)}|{re.escape(str(ROOT))}"  # a sentence is for every machine
    reason = re.sub(f"({places})/", "", result.get("reason", ""))
    ends = "" if not reason or reason.endswith((".", "!", "?")) else "."
    return result | {"reason": reason + ends, "wall_s": time.monotonic() - began}


def cpus(threads: int) -> list[int]:
    """The last ones: the first is where the kernel likes to put everything else."""
    return sorted(os.sched_getaffinity(0))[-threads:]


def lanes(of: Iterable[int] | None = None) -> list[list[int]]:
    """Where two cells of one thread each may be at once: a processor of each of the last two cores, never two of one core.
    One at a time takes samples (cell_protocol.turn), so that more lanes would gain little."""
    cores = {}
    for cpu in everywhere() if of is None else of:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores[siblings.read_text() if siblings.exists() else ""] = [cpu]
    return list(cores.values())[-2:]


def everywhere() -> list[int]:
    """For what is not timed, so that several can run at once."""
    return sorted(os.sched_getaffinity(0))


def thread_environ(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def _lines(out: Path) -> list[dict]:
    """What the worker wrote; a line that it was killed in says nothing."""
    found = []
    for line in out.read_bytes().splitlines() if out.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _watch(process: subprocess.Popen, out: Path, limit: float) -> str:
    """How it ended: exit, timeout, oom or crowded. The limit is that of the first call; all the rest may take REST times as
    long. Workers side by side share the memory, and the largest of them gives way."""
    began, most = time.monotonic(), MEMORY_SHARE * psutil.virtual_memory().total
    watched, called = psutil.Process(process.pid), False
    while True:
        try:
            process.wait(POLL_S)
            return "exit"
        except subprocess.TimeoutExpired:
            if STOP.is_set():
                raise Stopped from None
            called = called or (out.exists() and b'"correctness"' in out.read_bytes())
            if time.monotonic() - began > limit * (REST if called else 1):
                return "timeout"
            with contextlib.suppress(psutil.Error):
                mine = resident[process.pid] = watched.memory_info().rss
                if sum(every := [*resident.values()]) > most and mine == max(every):
                    return "oom" if mine > most else "crowded"


def _ended(ended: str, stage: str, limit: float, code: int | None, said: str) -> dict:
    if ended == "timeout":
        return {"status": "timeout", "reason": f"It did not end within {limit:.0f} s; it was in the stage: {stage}."}
    if ended in ("oom", "crowded"):
        who = "It" if ended == "oom" else "It and the workers beside it"
        return {
            "status": "oom",
            "reason": f"{who} took more than {MEMORY_SHARE:.0%} of the machine's memory in the stage: {stage}.",
            "crowded": ended == "crowded",
        }
    if code is not None and code < 0:
        return {
            "status": "crashed",
            "reason": f"The process died of {signal.Signals(-code).name} in the stage: {stage}. {said}",
        }
    return {"status": "error", "reason": f"The process ended with code {code} in the stage: {stage}. {said}"}
