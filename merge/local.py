"""Drives a merge schedule with threads of this process: every job runs here, as soon as its inputs exist.

Torch and the object store release the interpreter's lock in what takes time. Not here: several machines (the pipeline
runs the same jobs as Ray tasks).
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from infra.store import Store
from merge.jobs import Job, JobResult, Ref, run_job
from merge.schedule import MergeSchedule


def run_threads(
    schedule: MergeSchedule,
    store: Store,
    experts: Mapping[str, Ref],
    workers: int,
    extras: Mapping[tuple[str, str], Ref] | None = None,
    progress: Callable[[Job], None] | None = None,
) -> None:
    """Make everything that the schedule still misses.

    `workers` jobs run at a time, each with the memory of one node: how many fit is the caller's to say. `extras`:
    (expert name, "fisher" or "gram") -> artifact, for the kinds in `schedule.extras`. `progress` is called after each
    job. The first error is raised once the jobs under way have ended; those that wait are not started.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
        running: dict[Future[JobResult], Job] = {}

        def start(jobs: Iterable[Job]) -> None:
            running.update({pool.submit(run_job, store, job): job for job in jobs})

        try:
            for (name, kind), ref in (extras or {}).items():
                start(schedule.add_extra(name, kind, ref))
            start(schedule.add_experts(experts))
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    start(schedule.finished(job, future.result()))
                    if progress:
                        progress(job)
        finally:
            for future in running:
                future.cancel()
