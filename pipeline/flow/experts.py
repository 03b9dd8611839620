"""The experts of a run, round by round: a shared support if they share a scored one, then each expert that is missing,
and what merges need to know of each beside it.

In the first round experts start from the base, in a later one from the merge of the round before, which they await; so
an expert that changes remakes all experts of the rounds after its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from infra.artifacts.manifests import Manifest
from infra.engine.once import Failed, every
from infra.engine.step import Step
from merge.methods.specs import Candidate, plan_reductions
from merge.tree.jobs import Ref
from merge.tree.reduction import Merges
from pipeline.flow.context import Flow, reason
from pipeline.flow.steps import (
    EXPERTS,
    changed,
    expected_tokens,
    expert_step,
    measurement_step,
    modelled_step,
    onto_step,
    support_step,
)


@dataclass(frozen=True)
class Looked:
    """The experts of a round by task: how they are made, and what is there before anything is trained."""

    steps: Mapping[str, Step]
    experts: Mapping[str, Manifest]


def start(flow: Flow) -> None:
    """Begin with the experts that take longest."""
    config = flow.inputs.config
    for number in range(1, config.rounds.count + 1):
        for task in sorted(config.held_in, key=lambda task: -expected_tokens(flow.inputs, task)):
            flow.once(("expert", number, task), partial(_expert, flow, number, task))


async def expert(flow: Flow, task: str) -> Manifest:
    """A task's expert, of the last round. Raises Failed."""
    return await _of_round(flow, flow.inputs.config.rounds.count, task)


async def _of_round(flow: Flow, number: int, task: str) -> Manifest:
    return await flow.once(("expert", number, task), partial(_expert, flow, number, task))


async def looked(flow: Flow, number: int) -> Looked:
    """The experts of a round, looked up together once what they start from is there. Raises Failed."""
    return await flow.once(("looked", number), lambda: _looked(flow, number))


async def _looked(flow: Flow, number: int) -> Looked:
    held_in, begin, supports = flow.inputs.config.held_in, None, dict[str, Manifest]()
    if number > 1:
        begin = await _merged(flow, number - 1)
        if flow.inputs.config.rounds.support == "kept":
            supports = dict(zip(held_in, await every(*(_of_round(flow, number - 1, t) for t in held_in)), strict=True))
    elif (step := support_step(flow.inputs)) is not None:
        supports = dict.fromkeys(held_in, await flow.need(step, "selecting the shared support"))
    steps = {task: expert_step(flow.inputs, task, supports.get(task), number, begin) for task in held_in}
    found = await flow.engine.find([(step.keys[0], step.inputs) for step in steps.values()])
    return Looked(steps, {task: each for task, each in zip(steps, found, strict=True) if each is not None})


async def _expert(flow: Flow, number: int, task: str) -> Manifest:
    outcome, display, there = flow.outcome, flow.display, await looked(flow, number)
    if task in there.experts:
        manifest, made = there.experts[task], False
        flow.engine.tally.add(EXPERTS, 0, 1)
    else:
        try:
            ((manifest, made),) = await flow.engine.make(there.steps[task])
        except Exception as error:
            flow.errors.append(error)
            outcome.failed[task] = reason(error)
            display.state(task, "failed", outcome.failed[task])
            raise Failed(f"expert {task!r}") from error
    state, detail = "reused", manifest.key[:12]
    if made and flow.engine.known(manifest):
        loss, seconds = manifest.meta["validation_loss"], manifest.meta["seconds"]
        state, detail = "done", f"validation loss {loss:.3f}, {seconds:.0f} s"
    if number < (rounds := flow.inputs.config.rounds.count):
        state, detail = "waiting", f"round {number} of {rounds} {state}, {detail}"
    display.state(task, state, detail)
    outcome.experts[task] = manifest  # of the last round that there is
    return manifest


# -- between rounds ---------------------------------------------------------------------------------------------


async def _merged(flow: Flow, number: int) -> Manifest:
    """The merge of a round that another one follows. Raises Failed."""

    async def merged() -> Manifest:
        candidate = flow.inputs.candidates.between
        assert candidate is not None
        return await on_start(flow, candidate, await tree(flow, [candidate], number).merge(candidate), number)

    return await flow.once(("merged", number), merged)


async def on_start(flow: Flow, candidate: Candidate, change: Manifest, number: int | None = None) -> Manifest:
    """What was merged of the changes of a round's experts (None: of the last round's), as a change of the base. Raises
    Failed."""
    number = number or flow.inputs.config.rounds.count
    if number == 1:
        return change

    async def added() -> Manifest:
        begin, held_in = await _merged(flow, number - 1), flow.inputs.config.held_in
        experts = {task: await _of_round(flow, number, task) for task in held_in}
        return await flow.need(onto_step(flow.inputs, candidate, begin, change, experts), f"merging by {candidate}")

    return await flow.once(("on start", number, candidate), added)


def tree(flow: Flow, candidates: Sequence[Candidate], number: int) -> Merges:
    """The merges of a round's experts, or of what they changed."""
    inputs, config = flow.inputs, flow.inputs.config
    return Merges(
        flow.engine,
        plan_reductions(candidates, len(config.held_in)),
        list(config.held_in),
        config.merge.fan_in,
        inputs.base.sha256,
        partial(_expert_ref, flow, number),
        partial(_measurement_ref, flow),
        partial(_complete, flow, number),
        inputs.base_weights,
        inputs.fused,
        partial(modelled_step, inputs),
        partial(_tell, flow),
        flow.failed,
    )


def _tell(flow: Flow, name: str, made: Manifest) -> None:
    if flow.engine.known(made) and made.kind != "task_mask":
        flow.display.line(f"{name}: {made.meta['experts']} experts, {made.meta['seconds']:.1f} s")


async def _expert_ref(flow: Flow, number: int, task: str) -> Ref:
    """An expert, for merging: what it changed."""
    expert = await _of_round(flow, number, task)
    return Ref(expert.key, expert.digest, (changed(expert),))


# -- what is measured of experts --------------------------------------------------------------------------------


async def measurement(flow: Flow, task: str, kind: str) -> Manifest:
    """A measurement of a task's expert. Raises Failed."""
    return await flow.once((kind, task), lambda: _measurement(flow, task, kind))


async def _measurement(flow: Flow, task: str, kind: str) -> Manifest:
    step = measurement_step(flow.inputs, task, kind, await expert(flow, task))
    manifest, made = await flow.make(step, f"measuring {kind} of {task!r}")
    if made and flow.engine.known(manifest):
        flow.display.line(f"{kind} of {task}: {manifest.meta['rows']} rows")
    return manifest


async def _measurement_ref(flow: Flow, task: str, kind: str) -> Ref:
    """A measurement of an expert, for merging."""
    return Ref.of(await measurement(flow, task, kind))


async def _complete(flow: Flow, number: int, kind: str | None) -> bool:
    """Whether every expert of a round, and what is measured of each as `kind`, is there already."""
    there = (await looked(flow, number)).experts
    if len(there) < len(flow.inputs.config.held_in):
        return False
    if kind is None:
        return True
    steps = [measurement_step(flow.inputs, task, kind, manifest) for task, manifest in there.items()]
    return None not in await flow.engine.find([(step.keys[0], step.inputs) for step in steps])
