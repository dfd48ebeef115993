"""What is said about raw samples: medians and quartiles for readers, minima for ratios (measurement, section 3)."""

from dataclasses import dataclass

import numpy as np

from harness.ledger import CellRecord, Process, Samples


@dataclass(frozen=True)
class Timing:
    """Seconds a call over all processes."""

    median: float
    q1: float
    q3: float
    minimum: float  # median over processes of each process's minimum


@dataclass(frozen=True)
class Summary:
    """One ok cell in the numbers of a table. Ratios are of minima."""

    derivative: Timing
    primal: Timing
    first_call: float  # median over processes, cold
    memory: int | None  # bytes: peak of a call and what `work` holds, the largest of the processes

    @property
    def ratio(self) -> float:
        return self.derivative.minimum / self.primal.minimum


def timing(samples: list[Samples]) -> Timing:
    wall = np.concatenate([s.wall for s in samples])
    q1, median, q3 = (float(q) for q in np.percentile(wall, [25, 50, 75]))
    return Timing(median, q1, q3, float(np.median([min(s.wall) for s in samples])))


def summary(record: CellRecord) -> Summary | None:
    """None unless the cell is ok: a cell that is not ok never gets a time."""
    if record.status != "ok" or not record.processes:
        return None
    peaks = [p.memory.peak + p.memory.work for p in record.processes if p.memory.peak is not None]
    return Summary(
        timing([p.derivative for p in record.processes]),
        timing([p.primal for p in record.processes]),
        float(np.median([p.first_call_s for p in record.processes])),
        max(peaks, default=None),
    )


def history_point(processes: list[Process]) -> float:
    """Median over processes of minimum / minimum of the reference kernel beside it: the least noisy number of a commit."""
    return float(np.median([min(p.derivative.wall) / min(p.derivative.reference) for p in processes]))
