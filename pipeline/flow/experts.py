"""The experts of a run: a shared support if they share a scored one, then each expert that is missing, and what merges
need to know of each beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from infra.artifacts.manifests import Manifest
from infra.engine.once import Failed
from merge.tree.jobs import Ref
from pipeline.flow.context import Flow, reason
from pipeline.flow.steps import EXPERTS, expected_tokens, expert_step, measurement_step, support_step


@dataclass(frozen=True)
class Looked:
    """What is there before anything is trained."""

    support: Manifest | None
    experts: Mapping[str, Manifest]


def start(flow: Flow) -> None:
    """Begin with the experts that take longest."""
    for task in sorted(flow.inputs.config.held_in, key=lambda task: -expected_tokens(flow.inputs, task)):
        flow.once(("expert", task), partial(_expert, flow, task))


async def expert(flow: Flow, task: str) -> Manifest:
    """A task's expert. Raises Failed."""
    return await flow.once(("expert", task), partial(_expert, flow, task))


async def looked(flow: Flow) -> Looked:
    """Which experts are there already, looked up together once the shared support is."""
    return await flow.once("looked", lambda: _looked(flow))


async def _looked(flow: Flow) -> Looked:
    step, support = support_step(flow.inputs), None
    if step is not None:
        support = await flow.need(step, "selecting the shared support")
    steps = {task: expert_step(flow.inputs, task, support) for task in flow.inputs.config.held_in}
    found = await flow.engine.find([(step.keys[0], step.inputs) for step in steps.values()])
    return Looked(support, {task: each for task, each in zip(steps, found, strict=True) if each is not None})


async def _expert(flow: Flow, task: str) -> Manifest:
    outcome, display, there = flow.outcome, flow.display, await looked(flow)
    if task in there.experts:
        manifest, made = there.experts[task], False
        flow.engine.tally.add(EXPERTS, 0, 1)
    else:
        try:
            ((manifest, made),) = await flow.engine.make(expert_step(flow.inputs, task, there.support))
        except Exception as error:
            flow.errors.append(error)
            outcome.failed[task] = reason(error)
            display.state(task, "failed", outcome.failed[task])
            raise Failed(f"expert {task!r}") from error
    if made and flow.engine.known(manifest):
        loss, seconds = manifest.meta["validation_loss"], manifest.meta["seconds"]
        display.state(task, "done", f"validation loss {loss:.3f}, {seconds:.0f} s")
    else:
        display.state(task, "reused", manifest.key[:12])
    outcome.experts[task] = manifest
    return manifest


async def measurement(flow: Flow, task: str, kind: str) -> Manifest:
    """A measurement of a task's expert. Raises Failed."""
    return await flow.once((kind, task), lambda: _measurement(flow, task, kind))


async def _measurement(flow: Flow, task: str, kind: str) -> Manifest:
    step = measurement_step(flow.inputs, task, kind, await expert(flow, task))
    manifest, made = await flow.make(step, f"measuring {kind} of {task!r}")
    if made and flow.engine.known(manifest):
        flow.display.line(f"{kind} of {task}: {manifest.meta['rows']} rows")
    return manifest


async def expert_ref(flow: Flow, task: str) -> Ref:
    """An expert, for merging."""
    return Ref.of(await expert(flow, task))


async def measurement_ref(flow: Flow, task: str, kind: str) -> Ref:
    """A measurement of an expert, for merging."""
    return Ref.of(await measurement(flow, task, kind))


async def complete(flow: Flow, kind: str | None) -> bool:
    """Whether every expert, and what is measured of each as `kind`, is there already."""
    there = (await looked(flow)).experts
    if len(there) < len(flow.inputs.config.held_in):
        return False
    if kind is None:
        return True
    steps = [measurement_step(flow.inputs, task, kind, manifest) for task, manifest in there.items()]
    return None not in await flow.engine.find([(step.keys[0], step.inputs) for step in steps])
