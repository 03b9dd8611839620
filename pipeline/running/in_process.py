"""A whole run in threads of this process, without Ray: for notebooks, tests, and small machines.

    from pipeline.running.in_process import run_here

    status = run_here("pipeline/configs/small.yaml", "train.steps=20", report=Path("report"))

The same flow over the same stores: it finds what a cluster made, a cluster finds what it made, and both may run at the
same time. What it lacks: a worker that dies takes the run with it, and a process has one such run at a time. Loading a
model changes for a while what holds for the whole process (torch's default type, where parameters are made), so one
piece of work is done at a time, too; services are asked meanwhile.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from rich.console import Console

from infra.artifacts.claims import Busy, Claim
from infra.engine.step import Answer, Made, Place, Query, Step, Work
from infra.engine.threads import Threads
from infra.store.s3 import Store
from pipeline.plan.preflight import Prepared
from pipeline.records.outcome import Inputs
from pipeline.running.driver import STOPPED, Site, drive
from pipeline.running.execute import Hear
from pipeline.running.signals import Handler

T = TypeVar("T")


def run_here(
    config_path: str | Path,
    *overrides: str,
    report: Path | None = None,
    site: Site | None = None,
    console: Console | None = None,
) -> int:
    """Run a configuration; `section.field=value` overrides a field. Returns the exit status of the main job.

    `report`: a folder that is given the report too. `site`: threads of this process, if nothing else is said. Ctrl-C
    stops the run. May be called where an event loop runs already, as it does in a notebook.
    """
    stop, shown = threading.Event(), console or Console(soft_wrap=True)
    with _threads_kept(), ThreadPoolExecutor(1, thread_name_prefix="run") as pool:
        try:
            status = pool.submit(drive, str(config_path), report, overrides, site or ThisProcess(), stop, shown)
            return status.result()
        except KeyboardInterrupt:
            stop.set()  # and the pool waits for the run's end
            return STOPPED


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """Work sets torch's number of threads, for the whole process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ThisProcess:
    """`pipeline.running.driver.Site`: threads of this process."""

    def check(self) -> None:
        """This machine is there."""

    def join(self, prepared: Prepared, console: Console) -> int:
        """See that every kind of worker fits on this machine."""
        resources = {"CPU": float(os.cpu_count() or 1), "memory": float(psutil.virtual_memory().total)}
        return min(1, prepared.check_cluster([{"Alive": True, "Resources": resources}], console))

    def hire(self, inputs: Inputs, hear: Hear) -> "Here":
        """Threads of this process."""
        return Here(inputs, hear)

    def heeding(self, handler: Handler) -> contextlib.AbstractContextManager[None]:
        """Signals are the caller's, who stops the run by its flag."""
        return contextlib.nullcontext()


class Here:
    """`pipeline.running.execute.Crew`."""

    def __init__(self, inputs: Inputs, hear: Hear) -> None:
        """To be called in the run's event loop."""
        loop, resources = asyncio.get_running_loop(), inputs.config.resources

        def report(subject: str, what: Any) -> None:
            if self._over.is_set():
                raise SystemExit("the run was stopped")
            loop.call_soon_threadsafe(hear, subject, what)

        place = Place(threads=max(1, int(resources.expert.cpus)), report=report)
        self._threads = Threads(inputs.store, {"registry": resources.concurrent_registrations}, place)
        self._turn, self._working, self._over = asyncio.Semaphore(1), threading.Lock(), threading.Event()

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        """The step's work, when its turn has come."""
        async with self._turn:  # before the lease is taken
            return await self._threads.run(replace(step, call=partial(self._work, step.call)), claim)

    def _work(self, call: Work, store: Store, place: Place) -> Made:
        with self._working:  # whoever awaited it may be gone
            if self._over.is_set():
                raise SystemExit("the run was stopped")
            return call(store, place)

    async def ask(self, query: Query[T]) -> T:
        """The query's answer."""
        return await self._threads.ask(query)

    async def serve(self) -> None:
        """Nothing: threads need nobody beside them."""
        await asyncio.get_running_loop().create_future()

    def close(self) -> None:
        """Let work that is under way end: a training with its step, other work when it is done."""
        self._over.set()
        with self._working:
            pass
