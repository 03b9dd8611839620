"""Whether a Ray cluster has room for a run's workers; waiting for one that scales from zero, within a bound.

A cluster whose nodes come and go with what is asked of it starts as a head without CPUs. Its autoscaler is asked for
one node of every kind of worker, and is let go again when they are there.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.errors import ConfigError
from pipeline.config.resources import GIB, ResourcesConfig, WorkerResources
from pipeline.plan.cluster import slots_of
from pipeline.plan.figures import given, there_is

Nodes = list[dict[str, Any]]
"""What `ray.nodes()` returns."""
SCALING_FROM_ZERO = 600.0
"""Seconds that a cluster without a CPU is waited for, unless the configuration says otherwise."""
_POLL = 2.0
_SAY_EVERY = 60.0


def kinds_of(resources: ResourcesConfig) -> dict[str, WorkerResources]:
    """Workers by the name of the configuration's field."""
    own = {"refine": resources.refine} if resources.refine is not None else {}
    return {"expert": resources.expert, "evaluator": resources.evaluator, "node": resources.node, **own}


def missing(resources: ResourcesConfig, nodes: Nodes) -> str | None:
    """The first kind of worker that no living node has room for, in words; None if there is room for each."""
    for kind, asked in kinds_of(resources).items():
        if slots_of(nodes, asked) < 1:
            living: list[dict[str, float]] = [node["Resources"] for node in nodes if node["Alive"]]
            largest = max(living, key=lambda node: node.get("CPU", 0), default={})
            cpus, gpus, memory = map(given, (asked.cpus, asked.gpus, asked.memory_gib))
            return (
                f"resources.{kind} asks for {cpus} CPUs, {gpus} GPUs and {memory} GiB; no node of the Ray cluster has "
                f"that (the largest: {given(largest.get('CPU', 0))} CPUs, {given(largest.get('GPU', 0))} GPUs, "
                f"{there_is(largest.get('memory', 0) / GIB)} GiB)"
            )
    return None


def wait_for_room(
    resources: ResourcesConfig,
    say: Callable[[str], None],
    nodes: Callable[[], Nodes] | None = None,
    ask: Callable[[Sequence[Mapping[str, float]]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Nodes:
    """The cluster's nodes, as soon as there is one for every kind of worker. `nodes` and `ask` stand for Ray's list of
    nodes and its autoscaler.

    Raises ConfigError, saying what is missing, after `resources.cluster_wait_seconds`; at once where that is 0, or null
    and a node has a CPU.
    """
    nodes, ask = nodes or _nodes, ask or ask_autoscaler
    found = nodes()
    lacking = missing(resources, found)
    bound = _bound(resources, found)
    if lacking is not None and bound:
        began, said = clock(), 0.0
        say(f"{lacking}. Waiting for one, at most {bound:g} s (resources.cluster_wait_seconds)")
        ask([bundle(asked) for asked in kinds_of(resources).values()])
        try:
            while lacking is not None and (passed := clock() - began) < bound:
                if passed - said >= _SAY_EVERY:
                    said = passed
                    say(f"still waiting for the Ray cluster, {passed:.0f} of {bound:g} s")
                pause(min(_POLL, bound - passed))
                found = nodes()
                lacking = missing(resources, found)
        finally:
            ask([])
    if lacking is not None:
        waited = f"; {bound:g} s were waited for one (resources.cluster_wait_seconds)" if bound else ""
        raise ConfigError(f"{lacking}{waited}. Lower the request or add nodes.")
    return found


def _nodes() -> Nodes:
    import ray  # not above: a plan looks at room without joining a cluster

    return list(ray.nodes())


def _bound(resources: ResourcesConfig, nodes: Nodes) -> float:
    if resources.cluster_wait_seconds is not None:
        return resources.cluster_wait_seconds
    return 0.0 if any(node["Alive"] and node["Resources"].get("CPU", 0) for node in nodes) else SCALING_FROM_ZERO


def bundle(asked: WorkerResources) -> dict[str, float]:
    """A worker as Ray's autoscaler counts."""
    wanted = {"CPU": asked.cpus, "GPU": asked.gpus, "memory": int(asked.memory_gib * GIB)}
    return {name: amount for name, amount in wanted.items() if amount}


def ask_autoscaler(bundles: Sequence[Mapping[str, float]]) -> None:
    """What the cluster should have room for, until this is called again. A cluster without an autoscaler ignores it."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(each) for each in bundles])
