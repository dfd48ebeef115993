"""Environments: a backend whose pins conflict with ours has a virtual environment of its own, and its workers run in it.

`Backend.env` names it, `Backend.pins` is its whole lock: so a backend stays one file, and another pin is another key. It is
made by `adphys env create NAME` in the cache folder, and counts as made once all of its lock is installed.
"""

import importlib.metadata
import re
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

from backends import Backend
from harness import CACHE, UserError

LOCK = "lock.txt"  # what was installed, written last; whoever changes the pins, or our Python, makes it again


def folder(env: str) -> Path:
    return CACHE / "envs" / env


def python(library: type[Backend]) -> str:
    """The interpreter of its workers."""
    return sys.executable if library.env == "main" else str(folder(library.env) / "bin" / "python")


def is_made(library: type[Backend]) -> bool:
    """Whether its environment is there, and is the one of its pins."""
    if library.env == "main":
        return True
    lock = folder(library.env) / LOCK
    return lock.is_file() and lock.read_text() == _lock(library) and Path(python(library)).exists()


def create(library: type[Backend]) -> Path:
    """Makes it, anew where it is there. The pins are all that is installed. Raises UserError with pip's last words."""
    place = folder(library.env)
    try:
        venv.create(place, clear=True, symlinks=True)  # without pip: ours installs into it
        _run(
            [sys.executable, "-m", "pip", "--python", python(library), "install", "--quiet", "--no-deps", *library.pins]
        )
        (place / LOCK).write_text(_lock(library))
    except (OSError, subprocess.CalledProcessError) as e:
        said = (getattr(e, "stderr", "") or str(e)).strip().splitlines()[-1]
        raise UserError(
            f"The environment {library.env} cannot be made in {place} ({said}); see to that and create it again."
        ) from None
    return place


@cache
def installed(distribution: str, library: type[Backend]) -> bool:
    """Whether the interpreter of its workers finds the distribution. Asked once a run: it searches the whole path, and every
    cell of a listing asks."""
    if library.env == "main":
        return any(importlib.metadata.Distribution.discover(name=distribution))
    return _normal(distribution) in _distributions(python(library))


@cache
def _distributions(interpreter: str) -> set[str]:
    ask = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    return set(map(_normal, _run([interpreter, "-c", ask]).split()))


def _run(words: list[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _lock(library: type[Backend]) -> str:
    return "\n".join([f"# Python {sys.version_info.major}.{sys.version_info.minor}", *library.pins, ""])
