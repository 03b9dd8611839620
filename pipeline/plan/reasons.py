"""Why the stale experts of a forecast are stale: what `pipeline.plan.staleness` compares, looked up in the store and
MLflow.

The expert before is the one of the suite's latest finished run; else that of the latest registered version; else that
of the latest run that trained the task. Reads only.
"""

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from infra.artifacts.manifests import Manifest, peek
from infra.artifacts.snapshot import Snapshot
from infra.errors import DataError
from infra.registry.history import expert_keys
from infra.store.errors import ObjectMissing
from infra.store.layout import base_index, rows_name
from infra.store.s3 import Store
from pipeline.flow.rehearse import Forecast
from pipeline.plan.staleness import SEED, why_lost, why_stale
from pipeline.records.outcome import Inputs
from pipeline.records.results import Results
from workers.text.rows import Row, load_rows

NEW = "new task"


@dataclass(frozen=True)
class Reasons:
    """Why one expert is stale; `before` is the expert that it is compared with, if there is one."""

    task: str
    why: tuple[str, ...]
    before: Manifest | None = None


def find_reasons(forecast: Forecast, snapshot: Snapshot, results: Sequence[Results]) -> dict[str, Reasons]:
    """By task. `results` are results.json of the suite's earlier runs, the latest first.

    Raises StoreError, RegistryError.
    """
    lookup = _Lookup(forecast, snapshot, results[0] if results else None)
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(forecast.stale, pool.map(lookup.reasons, forecast.stale), strict=True))


@dataclass(frozen=True)
class _Lookup:
    forecast: Forecast
    snapshot: Snapshot
    latest: Results | None
    """results.json of the latest run."""

    @property
    def _inputs(self) -> Inputs:
        return self.forecast.inputs

    def reasons(self, task: str) -> Reasons:
        recipe = self.forecast.experts[task]
        lost = why_lost(self.snapshot, recipe.key, self.forecast.consumed.get(task, {}))
        if lost is not None:
            return Reasons(task, (lost,), peek(self.snapshot, recipe.key))
        last = self.latest.held_in.get(task) if self.latest else None
        keys = [*([last.expert_key] if last else []), *expert_keys(self._inputs.config.suite, task, 5 * self._seeds)]
        if not keys:
            return Reasons(task, (NEW,))
        if recipe.key in keys:  # it was made, and `why_lost` found nothing of it
            return Reasons(task, ("its manifest is gone",))
        known = [before for key in dict.fromkeys(keys) if (before := peek(self.snapshot, key))]
        if not known:
            return Reasons(task, ("the expert before is gone: nothing to compare with",))
        compared = [Reasons(task, self._why(task, before), before) for before in known]
        of_this_seed = [each for each in compared if not any(why.startswith(SEED) for why in each.why)]
        return (of_this_seed if self._seeds > 1 and of_this_seed else compared)[0]

    @property
    def _seeds(self) -> int:
        return len(self._inputs.config.seeds or [self._inputs.config.seed])

    def _why(self, task: str, before: Manifest) -> tuple[str, ...]:
        inputs, support = self._inputs, self.forecast.support_recipe
        supports = None
        if support is not None:
            earlier = next((found for key in before.inputs if (found := peek(self.snapshot, key))), None)
            supports = (support, earlier, inputs.tasks)
        data = inputs.tasks[task]
        recipe = self.forecast.experts[task]
        return tuple(why_stale(inputs.config, data, recipe, before, self._rows, self._base_name, supports))

    def _rows(self, fingerprint: str) -> Sequence[Row] | None:
        for data in self._inputs.tasks.values():
            for split, found in data.fingerprints.items():
                if found == fingerprint:
                    return data.splits[split]
        return stored_rows(self._inputs.store, fingerprint)

    def _base_name(self, sha256: str) -> str:
        name = self._inputs.base.name if sha256 == self._inputs.base.sha256 else stored_base(self._inputs.store, sha256)
        return f"{name} ({sha256[:12]})"


def stored_rows(store: Store, fingerprint: str) -> Sequence[Row] | None:
    """Rows of an earlier run; None if they are gone or damaged. Raises StoreError."""
    with contextlib.suppress(ObjectMissing, DataError):
        return load_rows(store, rows_name(fingerprint))
    return None


def stored_base(store: Store, sha256: str) -> str:
    """Name of a base that an earlier run used. Raises StoreError."""
    found = store.get_with_etag(base_index(sha256))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(found[0])["name"]) if found is not None else "another"
    return "another"
