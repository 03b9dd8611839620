"""Merging within a run: the tree over its experts, for all of its candidates."""

from functools import partial

from infra.artifacts.manifests import Manifest
from merge.methods.catalogue import METHODS
from merge.methods.specs import Candidate, plan_reductions
from merge.tree.reduction import Merges
from pipeline.flow import experts
from pipeline.flow.context import Flow
from pipeline.flow.steps import modelled_step


def merges_of(flow: Flow) -> Merges:
    """The merges of a run's experts."""
    inputs, config = flow.inputs, flow.inputs.config
    return Merges(
        flow.engine,
        plan_reductions(inputs.candidates.all, len(config.held_in)),
        list(config.held_in),
        config.merge.fan_in,
        inputs.base.sha256,
        partial(experts.expert_ref, flow),
        partial(experts.measurement_ref, flow),
        partial(experts.complete, flow),
        inputs.base_weights,
        inputs.fused,
        partial(modelled_step, inputs),
        partial(_tell, flow),
        flow.failed,
    )


def _tell(flow: Flow, name: str, made: Manifest) -> None:
    if flow.engine.known(made) and made.kind != "task_mask":
        flow.display.line(f"{name}: {made.meta['experts']} experts, {made.meta['seconds']:.1f} s")


async def merged(flow: Flow, merges: Merges, candidate: Candidate) -> Manifest:
    """A candidate's merge, noted. Raises Failed."""
    manifest = await merges.merge(candidate)
    flow.outcome.merged[candidate] = manifest
    return manifest


async def mask(flow: Flow, merges: Merges, candidate: Candidate, task: str) -> Manifest | None:
    """A task's mask of a candidate that needs one, noted. Raises Failed."""
    if not METHODS[candidate.method].per_task:
        return None
    manifest = await merges.mask(candidate, task)
    flow.outcome.masks[candidate, task] = manifest
    return manifest
