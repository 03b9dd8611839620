"""What a run says it uses, so that garbage collection (`infra/artifacts/gc.py`) leaves it alone. Which runs are kept,
and for how long, is `pipeline.collection.retention`."""

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from infra.artifacts.announcements import announce, await_removals
from infra.errors import StoreError
from infra.store.s3 import Store
from pipeline.flow.rehearse import known_keys
from pipeline.records.outcome import Inputs, Outcome


@dataclass
class Announcements:
    """What one run says it uses: first all that is known beforehand, for every seed, then what it learns."""

    store: Store
    run_id: str
    hashes: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, inputs: Sequence[Inputs]) -> None:
        """Announce everything that runs of these inputs use, before anything of it is looked for, and wait until no
        collection is removing any of it. Raises StoreError."""
        shared = {each.base.sha256 for each in inputs}
        shared |= {sha256 for each in inputs for data in each.tasks.values() for sha256 in data.fingerprints.values()}
        self.add(shared.union(*(known_keys(each) for each in inputs)))
        await_removals(self.store, shared)

    @contextlib.contextmanager
    def following(self, outcome: Outcome, every_s: float = 600.0) -> Iterator[None]:
        """Announce, while the block fills the outcome and at its end, what could not be known before: scores, and what
        is keyed by bytes. Every so many seconds all is announced again: the age of a run's list says whether it lives.

        Never fails: where the store does, a collection a day later may take what a later run then makes again.
        """
        over = threading.Event()

        def follow() -> None:
            while not over.wait(every_s):
                self._learn(outcome)

        thread = threading.Thread(target=follow, name="announcements", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._learn(outcome)

    def _learn(self, outcome: Outcome) -> None:
        with contextlib.suppress(StoreError):
            hashes = {*outcome.evaluations, *({outcome.checkpoint.key} if outcome.checkpoint else ())}
            self._announce(self.store.hasty(), hashes)

    def add(self, hashes: Collection[str]) -> None:
        """Announce these too, with all that is announced already. Raises StoreError; then they are not. Thread-safe."""
        self._announce(self.store, hashes)

    def _announce(self, store: Store, hashes: Collection[str]) -> None:
        with self._lock:
            all_known = self.hashes.union(hashes)
            announce(store, self.run_id, all_known)
            self.hashes = all_known
