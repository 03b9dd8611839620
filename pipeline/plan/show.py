"""`python -m pipeline plan`: what a run would make and reuse, why each expert is stale, and at what cost.

Reads the object store, MLflow and, for its slots, Ray's dashboard; writes to the local cache only and starts nothing.
Exit status: 0, or 2 for bad input and services that do not answer.
"""

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.artifacts.snapshot import Snapshot
from infra.ending import message
from infra.registry import runs
from infra.registry.history import results_of_runs
from infra.registry.versions import models_of
from infra.store.layout import MANIFESTS
from infra.store.s3 import Store
from pipeline.collection.command import size_text
from pipeline.config.model import load_config
from pipeline.data.counting import rows_json
from pipeline.flow.rehearse import Count, Forecast, forecast
from pipeline.plan.estimate import Estimate, estimate, find_slots
from pipeline.plan.preflight import Prepared, check_names, measured_flops, prepare_inputs
from pipeline.plan.reasons import Reasons, find_reasons
from pipeline.records.results import readable


@dataclass(frozen=True)
class Plan:
    """Forecast and reasons for each seed, and the cost of all of them."""

    prepared: Prepared
    forecasts: tuple[Forecast, ...]
    reasons: tuple[dict[str, Reasons], ...]
    estimate: Estimate

    def counts(self) -> dict[str, Count]:
        """Of all seeds together."""
        kinds = self.forecasts[0].counts
        return {kind: _added([each.counts[kind] for each in self.forecasts]) for kind in kinds}


def _added(counts: Sequence[Count]) -> Count:
    return Count(sum(c.make for c in counts), sum(c.reuse for c in counts), any(c.at_most and c.make for c in counts))


def plan(config_path: str, as_json: bool, overrides: tuple[str, ...]) -> None:
    """What a run would make and what it would reuse, why each expert is stale, and at what cost. Changes nothing."""
    terminal = sys.stderr if as_json else sys.stdout
    console = Console(stderr=as_json, soft_wrap=True, width=None if terminal.isatty() else 120)
    try:
        config = load_config(config_path, list(overrides))
        check_names(config)
        store = Store.from_env()
        # First of all, because a store that does not answer, or lacks the bucket, is refused here.
        listed = frozenset(store.list(MANIFESTS))
        runs.check()
        found = make_plan(prepare_inputs(config, store, console), listed)
    except Exception as error:
        console.print(f"error: {message(error)}", style="bold red", markup=False, highlight=False)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(plan_json(found), indent=1, ensure_ascii=False))
    else:
        show(found, console)


def make_plan(prepared: Prepared, listed: Collection[str] | None = None) -> Plan:
    """Look everything up; of artifacts only those whose manifests are `listed`, if that is given. Raises StoreError,
    RegistryError."""
    config, snapshot = prepared.config, Snapshot(prepared.store, listed=listed)
    results = readable(results_of_runs(prepared.store, config.suite))
    models = {model.name: model for model in models_of(config.suite)}
    expected: set[str] = set()
    forecasts = tuple(forecast(inputs, snapshot, models, expected) for inputs in prepared.replicates(""))
    reasons = tuple(find_reasons(each, snapshot, results) for each in forecasts)
    before = {task: reason.before for found in reasons for task, reason in found.items() if reason.before}
    slots = find_slots(config.resources, results)
    return Plan(
        prepared, forecasts, reasons, estimate(forecasts, before, results, prepared.cost, slots, measured_flops)
    )


def plan_json(found: Plan) -> dict[str, Any]:
    """For machines. Names are an interface: add, never rename."""
    prepared, cost = found.prepared, found.estimate
    return {
        "suite": prepared.config.suite,
        "base": {"name": prepared.base.name, "sha256": prepared.base.sha256},
        "rows": {name: rows_json(data) for name, data in prepared.tasks.items()},
        "kinds": {kind: vars(count) for kind, count in found.counts().items()},
        "experts": [
            {
                "task": task,
                "seed": each.inputs.config.seed,
                "key": recipe.key,
                "state": "make" if task in reasons else "reuse",
                "why": list(reasons[task].why) if task in reasons else [],
            }
            for each, reasons in zip(found.forecasts, found.reasons, strict=True)
            for task, recipe in each.experts.items()
        ],
        "estimate": {
            "slots": cost.slots.experts,
            "slots_from": cost.slots.source,
            "seconds": cost.seconds,
            "bytes": cost.bytes,
            "stages": {
                stage.kind: {"seconds": stage.seconds, "bytes": stage.bytes, "from": stage.source}
                for stage in cost.stages
            },
        },
    }


# -- for people -------------------------------------------------------------------------------------------------


def show(found: Plan, console: Console) -> None:
    """Print the plan."""
    for each, reasons in zip(found.forecasts, found.reasons, strict=True):
        if len(found.forecasts) > 1:
            console.print(f"seed {each.inputs.config.seed}", highlight=False)
        if not reasons:
            console.print(f"all {len(each.experts)} experts exist", highlight=False)
            continue
        table = Table("expert", "why it has to be made", title="stale experts", title_justify="left", box=None)
        for task, reason in reasons.items():
            table.add_row(Text(task), Text("; ".join(reason.why)))
        console.print(table)
    counts = found.counts()
    if not any(count.make for count in counts.values()):
        console.print("nothing to do: a run would find everything and register nothing", highlight=False)
    console.print(_table(found, counts))
    if found.estimate.stages:
        console.print(
            f"together at most {_duration(found.estimate.seconds)} on {found.estimate.slots.experts} slots "
            f"({found.estimate.slots.source}), as far as known, without start-up; {_size(found.estimate.bytes)} more "
            "in the object store",
            highlight=False,
        )


def _table(found: Plan, counts: dict[str, Count]) -> Table:
    table = Table("kind", "make", "reuse", "time", "bytes", "estimated from", title_justify="left", box=None)
    stages = {stage.kind: stage for stage in found.estimate.stages}
    for kind, count in counts.items():
        if not (count.make or count.reuse):
            continue
        least = "at least " if count.at_most else ""
        row = [kind.replace("_", " "), f"{'at most ' if count.at_most else ''}{count.make}", f"{least}{count.reuse}"]
        if kind in stages:
            stage = stages[kind]
            row += [_duration(stage.seconds), _size(stage.bytes), stage.source]
        table.add_row(*map(Text, row))
    return table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _size(size: int | None) -> str:
    return "" if size is None else size_text(size)
