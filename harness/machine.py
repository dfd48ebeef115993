"""What a number depends on beside the code: the machine, the versions, the commit, the lock."""

import hashlib
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import psutil

from harness import ROOT

LOCK = ROOT / "constraints.txt"


@cache
def lock_hash() -> str:
    return hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12] if LOCK.exists() else "no-lock"


def machine() -> dict:
    """CPU model, cores this process may use, memory in GiB, GPU, operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": _gpu(),
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "python": platform.python_version(),
    }


def machine_class() -> str:
    """The folder of the ledger: what must be alike for numbers to be compared."""
    m = machine()
    words = f"{m['cpu']} {m['cores']}c {m['ram_gib']}g {m['gpu'] or ''}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|processor|cpu|@.*?ghz", "", words.lower())).strip("-")


def commit() -> tuple[str | None, bool | None]:
    """(commit, whether what runs differs from it, new files included); None outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return head, bool(_git("status", "--porcelain", "--", "problems", "backends", "harness", "constraints.txt"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def load() -> dict:
    """What else the machine was doing: load average and ticks stolen by the host since boot."""
    steal = None
    stat = Path("/proc/stat")
    if stat.exists():
        fields = stat.read_text().split("\n", 1)[0].split()
        steal = int(fields[8]) if len(fields) > 8 else None
    return {"load1": os.getloadavg()[0], "steal_ticks": steal}


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


@cache
def _gpu() -> str | None:
    try:
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return (
            subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0].strip()
        )
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
