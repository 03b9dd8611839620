"""Merging within a run: the tree over its experts, for all of its candidates."""

from infra.artifacts.manifests import Manifest
from merge.methods.catalogue import METHODS
from merge.methods.specs import Candidate
from merge.tree.reduction import Merges
from pipeline.flow import experts
from pipeline.flow.context import Flow


def merges_of(flow: Flow) -> Merges:
    """The merges of a run's experts, of the last round."""
    return experts.tree(flow, flow.inputs.candidates.all, flow.inputs.config.rounds.count)


async def merged(flow: Flow, merges: Merges, candidate: Candidate) -> Manifest:
    """A candidate's merge, noted. Raises Failed."""
    manifest = await experts.on_start(flow, candidate, await merges.merge(candidate))
    flow.outcome.merged[candidate] = manifest
    return manifest


async def mask(flow: Flow, merges: Merges, candidate: Candidate, task: str) -> Manifest | None:
    """A task's mask of a candidate that needs one, noted. Raises Failed."""
    if not METHODS[candidate.method].per_task:
        return None
    manifest = await merges.mask(candidate, task)
    flow.outcome.masks[candidate, task] = manifest
    return manifest
