"""One run, top to bottom: experts → merge tree → choice, refining → test scores → registration and gate → export.

What is missing is made in the order in which its inputs appear: a merge node starts when its children exist, while
other experts still train; validation scores are those that the race for the best merge asks for. This is also what a
plan rehearses (`pipeline.flow.rehearse`). Where work runs is the engine's business; the report comes after
(`pipeline.report.results`).
"""

from functools import partial

from infra.engine.in_thread import in_thread
from infra.engine.once import every
from infra.engine.step import Engine
from merge.methods.specs import Candidate
from merge.tree.reduction import Merges
from pipeline.flow import experts, promotion, refining, scoring
from pipeline.flow.choice import best_per_task, choose
from pipeline.flow.context import Flow
from pipeline.flow.merges import merges_of
from pipeline.flow.steps import export_step
from pipeline.records.refined import Merge


async def run(flow: Flow, merges: Merges | None = None) -> None:
    """Make what is missing; the outcome tells what there is. Raises Failed when everything else is done."""
    merges = merges or merges_of(flow)
    experts.start(flow)
    alone = flow.once("alone", lambda: _experts_and_base(flow))
    await every(alone, _merge(flow, merges), refining.multitask(flow), scoring.test_routed(flow))


async def _experts_and_base(flow: Flow) -> None:
    """All that needs no merge."""
    await every(scoring.base_tests(flow), *(_expert(flow, task) for task in flow.inputs.config.held_in))


async def _expert(flow: Flow, task: str) -> None:
    """One expert: made, tested, and compared once the base's score stands beside its own on its card."""
    manifest = await experts.expert(flow, task)
    await every(scoring.score(flow, "expert", "test", task, manifest), scoring.base_test(flow, task, "base", 0))
    await promotion.promote_expert(flow, task)


async def _merge(flow: Flow, merges: Merges) -> None:
    """The merges of all candidates, scored."""
    await every(_chosen(flow, merges), _tested_per_task(flow, merges))


async def _chosen(flow: Flow, merges: Merges) -> None:
    """The merge that wins the race."""
    await flow.engine.alternatives(await choose(flow, merges), partial(_finish, flow))


async def _tested_per_task(flow: Flow, merges: Merges) -> None:
    """Methods that need the task at inference: the best parameters of each are tested, never chosen."""

    async def test(engine: Engine, candidate: Candidate) -> None:
        await scoring.test_per_task(flow.on(engine), candidate)

    for group in await best_per_task(flow, merges):
        await flow.engine.alternatives(group, test)


async def _finish(flow: Flow, engine: Engine, chosen: Merge) -> None:
    """Test, export, register and compare the merge that is chosen."""
    flow = flow.on(engine)
    flow.outcome.chosen = chosen
    alone = flow.once("alone", lambda: _experts_and_base(flow))
    await every(scoring.test_merge(flow, flow.outcome.merged[chosen]), _export(flow, chosen), alone)
    await promotion.promote_merge(flow, chosen)


async def _export(flow: Flow, chosen: Merge) -> None:
    """The chosen merge as a full checkpoint, if one is asked for."""
    step = export_step(flow.inputs, flow.outcome.merged[chosen])
    if step is not None:
        await in_thread(flow.announce, set(step.keys))
        flow.outcome.checkpoint = await flow.need(step, "export")
