"""The harness: cells, worker processes, the clock, the ledger, statistics, the command line.

The whole suite is `for cell in cells(pattern): ledger.append(measure(cell))`; what is timed is
`backend.wait(derivative(theta, data))`, nothing else.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("ADPHYS_CACHE") or ROOT / ".cache").absolute()  # references, and environments
PROTOCOL = 1  # raised whenever a number measured before could not be compared with one measured after


class UserError(Exception):
    """What was asked, why it cannot be, what to do: one sentence. The command line prints it and exits with 2."""
