"""A run rehearsed: what it would make and reuse (`plan`), and which keys it will use (announcements).

Nothing is made and nothing registered: the flow of a run goes through an engine that answers with stand-ins.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from rich.console import Console

from infra.artifacts.manifests import Manifest, Recipe
from infra.artifacts.snapshot import Snapshot
from infra.engine.once import Failed
from infra.engine.rehearsal import Rehearsal
from infra.engine.step import Step
from infra.registry.versions import Model
from infra.store.s3 import ObjectInfo
from pipeline.flow import experts
from pipeline.flow.context import Flow
from pipeline.flow.queries import Registry
from pipeline.flow.run import run
from pipeline.flow.steps import KINDS, REFINED, ROUTERS, SUPPORT, TEACHERS, YARDSTICKS, support_step
from pipeline.records.outcome import Inputs, Outcome
from pipeline.report.display import Display


@dataclass
class Count:
    """How many artifacts of a kind a run would make and reuse; `at_most`: it may make fewer and reuse more."""

    make: int = 0
    reuse: int = 0
    at_most: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a run of one seed would do."""

    inputs: Inputs
    support: Manifest | None
    """The shared support, if there is one and it exists."""
    counts: Mapping[str, Count]
    stale: tuple[str, ...]
    """Tasks whose expert would be made, in the order of the configuration."""
    found: tuple[Manifest, ...]
    """What would be reused, scores included."""
    inner_nodes: int
    """Merge nodes that are no roots."""
    consumed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By task, digests by key of what its expert would be made of, beside base and rows."""
    rounds: tuple[tuple[str, ...], ...] = ()
    """Tasks whose expert would be trained, by round; none of them said: `stale` is the only one."""

    @cached_property
    def support_recipe(self) -> Recipe | None:
        """Of the shared support, if experts share a scored one."""
        step = support_step(self.inputs)
        return step.recipes[0] if step else None

    @cached_property
    def experts(self) -> dict[str, Recipe]:
        """By task, of the last round."""
        return expert_recipes(self.inputs)


def forecast(
    inputs: Inputs, snapshot: Snapshot, models: Mapping[str, Model], expected: set[str] | None = None
) -> Forecast:
    """What a run of these inputs would do. `models` are the suite's registered models by name; `expected`: keys that
    runs of other seeds make before, to which those of this one are added. Raises StoreError."""
    services = Registry(models, inputs.store)
    engine = Rehearsal(snapshot, KINDS, services, set() if expected is None else expected)
    outcome, trained = _rehearse(inputs, engine)
    tally, doubtful = engine.tally, engine.doubtful()
    config = inputs.config
    optional = {
        TEACHERS: config.asking, REFINED: config.refine, YARDSTICKS: config.yardsticks.multitask,
        ROUTERS: config.yardsticks.routed,
    }  # fmt: skip
    absent = {kind for kind, section in optional.items() if section is None}
    supports = [each for each in engine.found if each.kind == SUPPORT]
    return Forecast(
        inputs=inputs,
        support=supports[0] if supports else None,
        counts={
            kind: Count(tally.made[kind], tally.reused[kind], kind in doubtful and tally.made[kind] > 0)
            for kind in KINDS
            if kind not in absent
        },
        stale=tuple(task for task in inputs.config.held_in if outcome.experts[task].key in engine.lacking),
        found=tuple(engine.found),
        inner_nodes=sum(step.label == "statistics" for step in engine.steps),
        consumed={task: step.inputs for task, step in trained[-1].items()},
        rounds=tuple(
            tuple(task for task, step in steps.items() if step.keys[0] in engine.lacking) for steps in trained
        ),
    )


def known_keys(inputs: Inputs) -> frozenset[str]:
    """Every key that a run of these inputs uses or makes and that is known before it starts. Not known: whatever is
    keyed by the bytes of what is made, so scores of experts and merges, and the full checkpoint."""
    engine = Rehearsal(Snapshot(_Nothing()), KINDS, Registry({}, inputs.store))
    _rehearse(inputs, engine)
    return frozenset(engine.keys())


def expert_recipes(inputs: Inputs) -> dict[str, Recipe]:
    """The recipes of a run's experts by task, of the last round."""
    engine = Rehearsal(Snapshot(_Nothing()), KINDS, Registry({}, inputs.store))
    steps = asyncio.run(_trained(_flow(inputs, engine)))[-1]
    return {task: step.recipes[0] for task, step in steps.items()}


def _rehearse(inputs: Inputs, engine: Rehearsal) -> tuple[Outcome, list[Mapping[str, Step]]]:
    """The outcome, and the experts' steps by round. Raises what kept the rehearsal from its end."""
    flow = _flow(inputs, engine)

    async def rehearsed() -> list[Mapping[str, Step]]:
        await run(flow)
        return await _trained(flow)

    try:
        return flow.outcome, asyncio.run(rehearsed())
    except Failed:
        raise flow.errors[0] from None


def _flow(inputs: Inputs, engine: Rehearsal) -> Flow:
    display = Display(list(inputs.config.held_in), Console(quiet=True))
    return Flow(inputs, engine, Outcome(), display, lambda keys: None, rehearsed=True)


async def _trained(flow: Flow) -> list[Mapping[str, Step]]:
    """How the experts of each round are made, by task."""
    rounds = range(1, flow.inputs.config.rounds.count + 1)
    return [(await experts.looked(flow, number)).steps for number in rounds]


class _Nothing:
    """An empty store."""

    def get_with_etag(self, name: str) -> tuple[bytes, str] | None:
        return None

    def head(self, name: str) -> ObjectInfo | None:
        return None
