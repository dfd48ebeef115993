"""The thin suite that asv itself runs: the derivative of every quick cell, one benchmark a task.

asv is the historian of this repository. Its history comes from the ledger, with `adphys export-asv`, and nothing is
measured twice; this suite is for measuring a commit, or two against each other, in an environment that asv builds from
the lock of that very commit:

    asv machine --yes                                                          once, for asv's own results
    asv run --bench 'brusselator.rhs.*numba/adjoint' HEAD^!                    one cell at one commit
    asv continuous HEAD~1 HEAD --bench 'brusselator.rhs.*numba/adjoint'        one cell, this commit against the last

Results of `asv run` stand beside the exported ones under names of their own; run `adphys export-asv` after it, because
asv forgets every benchmark that its last run did not see. The gate for regressions is `adphys compare`, not asv.

A round is one fresh worker process and gives one number, its minimum; asv alternates the rounds of two commits. There
are seven, enough for asv's rank test, which can never tell six a side apart. asv imports this folder as a package of
its own, with the project installed and not beside it, and calls `setup` before every call, so that is a look-up.
"""

from asv_runner.benchmarks.mark import SkipNotImplemented

from harness import PROTOCOL, asv_shared, cells, measure, run

BUDGET_S = 0.5  # of derivative samples in each round


def _benchmark(task, ways):
    """The benchmark of a task; `ways` is {way: cell}."""

    def setup(way, size):
        status, reason = cells.known_status(ways[way])
        if status in asv_shared.SKIPPED:
            raise NotImplementedError(reason)

    def track_derivative(way, size):
        record = measure.measure(ways[way], budget=BUDGET_S, number=1, limit=run.PRESETS["quick"].limit)
        if record.status in asv_shared.SKIPPED:
            raise SkipNotImplemented(record.reason)
        if record.status != "ok":
            raise RuntimeError(f"{record.cell} is {record.status}: {record.reason}")
        samples = record.processes[0].derivative
        return {"samples": [min(samples.wall)], "number": samples.number}

    problem, _, name = task.partition(".")
    statement = cells.modules("problems")[problem].read_text()
    track_derivative.benchmark_name = f"{task}.track_derivative"
    track_derivative.setup = setup
    track_derivative.params = (list(ways), sorted({cell.size for cell in ways.values()}))
    track_derivative.param_names = ["way", "size"]
    track_derivative.type = "time"
    track_derivative.unit = "seconds"
    track_derivative.rounds = 7
    track_derivative.version = asv_shared.version(PROTOCOL, statement, name)
    return track_derivative


_QUICK = run.plan([], "quick", "cpu")
for _task in dict.fromkeys(cell.name for cell in _QUICK):
    globals()[f"track_{_task}"] = _benchmark(_task, {cell.way: cell for cell in _QUICK if cell.name == _task})
