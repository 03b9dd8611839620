"""Drives a merge schedule with threads of this process: every job runs here, as soon as its inputs exist.

Torch and the object store release the interpreter's lock in what takes time. What another process is making is waited
for. Not here: several machines (the pipeline runs the same jobs as Ray tasks).
"""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from infra.claims import Busy, Claim, under_claim
from infra.elsewhere import Elsewhere
from infra.leases import EXPIRY_S
from infra.store import Store
from merge.dispatch import Dispatch
from merge.jobs import Job, JobResult, Ref, run_job
from merge.schedule import MergeSchedule

_POLL_S = 0.25  # while something is made elsewhere


def run_threads(
    schedule: MergeSchedule,
    store: Store,
    experts: Mapping[str, Ref],
    workers: int,
    extras: Mapping[tuple[str, str], Ref] | None = None,
    progress: Callable[[Job], None] | None = None,
    expiry_s: float = EXPIRY_S,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> None:
    """Make everything that the schedule still misses.

    `workers` jobs run at a time, each with the memory of one node: how many fit is the caller's to say. `extras`:
    (expert name, "fisher" or "gram") -> artifact, for the kinds in `schedule.extras`. `progress` is called after each
    job. `expiry_s`: of leases. `say` gets a line about each piece of work that another process is making and that is
    waited for. The first error is raised once the jobs under way have ended; those that wait are not started.
    """
    elsewhere = Elsewhere(store, expiry_s, say)
    running: dict[Future[JobResult | Busy], Callable[[JobResult | Busy], None]] = {}

    def enqueue(job: Job, claim: Claim | None, answered: Callable[[JobResult | Busy], None]) -> None:
        running[pool.submit(_run, store, job, claim)] = answered

    def done(job: Job, result: JobResult) -> None:
        if progress:
            progress(job)

    dispatch = Dispatch(store, schedule, elsewhere, enqueue, done, workers)
    with contextlib.closing(dispatch), ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
        try:
            for (name, kind), ref in (extras or {}).items():
                dispatch.start(schedule.add_extra(name, kind, ref))
            dispatch.start(schedule.add_experts(experts))
            while running or elsewhere.open:
                for future in wait(running, _POLL_S if elsewhere.open else None, FIRST_COMPLETED).done:
                    running.pop(future)(future.result())
                elsewhere.poll()
                if elsewhere.open and not running:
                    time.sleep(_POLL_S)
        finally:
            for future in running:
                future.cancel()


def _run(store: Store, job: Job, claim: Claim | None) -> JobResult | Busy:
    """A job under its claim, or under leases that the dispatch holds."""
    return run_job(store, job) if claim is None else under_claim(store, claim, lambda: run_job(store, job))
