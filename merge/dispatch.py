"""Hands a merge schedule's jobs out under leases, to Ray tasks (`pipeline.merging`) or to threads (`merge.local`).

A job takes the leases of all keys that it makes, in the worker. A node split over several jobs is held by the driver
from its first part to the end of its `FinishJob`; only a few such nodes are open at a time, so that a run holds no more
than it works on. What somebody else makes is waited for (`infra.elsewhere`).
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from infra.claims import Busy, Claim, claimed
from infra.elsewhere import Elsewhere
from infra.store import Store
from merge.jobs import FinishJob, Job, JobResult, KeyedJob, NodeJob, RootJob, find_made, job_name, keys_of
from merge.schedule import MergeSchedule

Enqueue = Callable[[Job, Claim | None, Callable[[JobResult | Busy], None]], None]
"""Gives a job to a worker, which runs it under the claim; None: the driver holds the leases. The callback gets what it
answers."""
_Slot = tuple[int, str]


class Dispatch:
    """A schedule in the hands of one driver. Not thread-safe. `close` releases what the driver holds."""

    def __init__(
        self,
        store: Store,
        schedule: MergeSchedule,
        elsewhere: Elsewhere,
        enqueue: Enqueue,
        done: Callable[[Job, JobResult], None],
        open_splits: int,
    ) -> None:
        """`done` is told of each job that is done, here or elsewhere, after those that follow were handed out.

        `open_splits`: how many nodes in parts are worked on at a time.
        """
        self._store, self._schedule, self._elsewhere = store, schedule, elsewhere
        self._enqueue, self._done, self._open_splits = enqueue, done, open_splits
        self._splits: deque[tuple[list[NodeJob | RootJob], Mapping[str, str]]] = deque()
        self._held: dict[_Slot, tuple[Claim, contextlib.ExitStack]] = {}

    def start(self, jobs: Iterable[Job]) -> None:
        """Hand out what the schedule gave."""
        splits: dict[_Slot, list[NodeJob | RootJob]] = {}
        for job in jobs:
            if isinstance(job, NodeJob | RootJob) and job.part is not None:
                splits.setdefault(_slot(job), []).append(job)
            elif isinstance(job, FinishJob):
                self._hand_out(job)
            else:
                self._submit(job)
        self._splits.extend((parts, {}) for parts in splits.values())
        self._open()

    def failed(self, job: Job) -> None:
        """A job has failed: what the driver holds for it is given back, and another node's parts may follow."""
        if isinstance(job, FinishJob) or (isinstance(job, NodeJob | RootJob) and job.part is not None):
            self._release(_slot(job.whole if isinstance(job, FinishJob) else job))
            self._open()

    def close(self) -> None:
        """Give back the leases of nodes whose parts are not done."""
        for slot in list(self._held):
            self._release(slot)

    def _submit(self, job: KeyedJob) -> None:
        self._elsewhere.submit(
            job_name(job),
            keys_of(job),
            lambda claim, answered: self._enqueue(job, claim, answered),
            lambda: find_made(self._store, job),
            lambda result: self._finished(job, result),
        )

    def _hand_out(self, job: Job) -> None:
        """A job of a node that the driver holds."""

        def answered(result: JobResult | Busy) -> None:
            assert not isinstance(result, Busy)
            if isinstance(job, FinishJob):
                self._release(_slot(job.whole))
            self._finished(job, result)

        self._enqueue(job, None, answered)

    def _finished(self, job: Job, result: JobResult) -> None:
        self.start(self._schedule.finished(job, result))
        self._done(job, result)

    # -- nodes in parts -----------------------------------------------------------------------------------------

    def _open(self) -> None:
        while self._splits and len(self._held) < self._open_splits:
            parts, takeover = self._splits.popleft()
            self._open_split(parts, takeover)

    def _open_split(self, parts: list[NodeJob | RootJob], takeover: Mapping[str, str]) -> None:
        whole: NodeJob | RootJob = replace(parts[0], part=None)
        claim = self._elsewhere.claim(keys_of(whole), takeover)
        with contextlib.ExitStack() as leases:
            busy = leases.enter_context(claimed(self._store, claim))
            found = None if busy else find_made(self._store, whole)  # somebody may have published it just before
            if busy is None and found is None:
                self._held[_slot(whole)] = claim, leases.pop_all()
        if busy is not None:
            self._elsewhere.returned(claim)
            self._elsewhere.wait(
                job_name(whole),
                claim.keys,
                lambda: find_made(self._store, whole),
                lambda result: self._finished(whole, result),
                lambda expired: self._again(parts, expired),
            )
        elif found is not None:
            self._elsewhere.returned(claim)
            self._finished(whole, found)
        else:
            for part in parts:
                self._hand_out(part)

    def _again(self, parts: list[NodeJob | RootJob], takeover: Mapping[str, str]) -> None:
        self._splits.appendleft((parts, takeover))
        self._open()

    def _release(self, slot: _Slot) -> None:
        held = self._held.pop(slot, None)
        if held is not None:
            claim, leases = held
            leases.close()
            self._elsewhere.returned(claim)


def _slot(job: NodeJob | RootJob) -> _Slot:
    return job.reduction, job.label
