"""What a run is expected to cost: seconds of each stage on the cluster's slots, and bytes, with where that comes from.

First choice are measurements of what is reused and of the experts before; then the suite's latest run that made such
things; at last, for training and bytes, the calculation that every run makes before it starts
(`pipeline.plan.preflight`). Stages are added up as if they did not overlap, which they do. Not included: start-up of
Ray and of workers, and registration.
"""

import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from infra.artifacts.manifests import Manifest
from pipeline.config.model import ResourcesConfig
from pipeline.flow.rehearse import Forecast
from pipeline.plan.cluster import check_answers, slots_of
from pipeline.plan.preflight import Cost
from pipeline.records.results import Results
from workers.measuring.catalogue import MEASUREMENTS

_SECONDS = 20  # for Ray's dashboard to answer
_MANIFESTS: Mapping[str, tuple[str, ...]] = {
    "support": ("support",),
    "importances": tuple(MEASUREMENTS),
    "merge_nodes": ("node", "merged"),
    "merges": ("merged",),
    "task_masks": ("task_mask",),
    "teachers": ("teacher",),
    "refined": ("refined",),
    "yardsticks": ("multitask",),
    "routers": ("router",),
    "evaluations": ("evaluation",),
    "checkpoints": ("checkpoint",),
}
"""Kinds of manifests by kind of work. The time of a merge is that of its root, so it is not counted again."""
_OF_RUN: Mapping[str, Callable[[Results], tuple[int, float]]] = {
    "merge_nodes": lambda run: (run.made.merge_nodes, run.seconds.merge),
    "evaluations": lambda run: (run.made.evaluations, run.seconds.evaluate),
}
"""How many of a kind a run made, and the seconds of all of them."""


@dataclass(frozen=True)
class Slots:
    """How many workers run at a time, and who says so."""

    experts: int
    evaluators: int
    source: str


@dataclass(frozen=True)
class Stage:
    """Expected wall seconds and bytes of one kind of work; None where nothing is known. `source`: what that is from."""

    kind: str
    seconds: float | None
    bytes: int | None
    source: str


@dataclass(frozen=True)
class Estimate:
    """The stages of a run that have anything to do."""

    slots: Slots
    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        """Of all stages together, as far as they are known."""
        return sum(stage.seconds or 0 for stage in self.stages)

    @property
    def bytes(self) -> int:
        """Of all stages together, as far as they are known."""
        return sum(stage.bytes or 0 for stage in self.stages)


def estimate(
    forecasts: Sequence[Forecast],
    before: Mapping[str, Manifest],
    results: Sequence[Results],
    cost: Cost,
    slots: Slots,
    flops: Callable[[], float],
) -> Estimate:
    """The cost of what the forecasts say would be made.

    `before` holds the last expert of tasks whose expert is stale; `results` are results.json of earlier runs of the
    suite, the latest first; `flops` measures this machine, if it must.
    """
    config = forecasts[0].inputs.config
    found = [manifest for each in forecasts for manifest in each.found]
    at_a_time = {
        "evaluations": slots.evaluators,
        "teachers": slots.evaluators,
        "merge_nodes": config.resources.concurrent_nodes,
    }
    stages = []
    for kind in forecasts[0].counts:
        make = sum(each.counts[kind].make for each in forecasts)
        total = make + sum(each.counts[kind].reuse for each in forecasts)
        if not make or kind == "registrations":
            continue
        if kind == "experts":
            stages.append(_experts(forecasts, before, found, cost, slots.experts, flops))
            continue
        if kind in cost.mixed:
            stages.append(_mixed(kind, make, before, found, cost, slots.experts, flops))
            continue
        own = [manifest for manifest in found if manifest.kind in _MANIFESTS[kind]]
        workers = at_a_time.get(kind, slots.experts)
        seconds, source = (None, "") if kind == "merges" else _seconds(kind, own, results)
        if kind == "teachers" and seconds is None:  # forward passes: a third of what training on as much takes
            share = cost.teacher_tokens / sum(cost.expert_tokens.values()) / total
            seconds, source = cost.seconds(1, flops()) * share / 3, "time: calculated"
        calculated = cost.kind_bytes.get(kind)
        size = _mean([_size(manifest) for manifest in own if kind != "merge_nodes" or manifest.kind == "node"])
        sources = [source, f"bytes: mean of {len(own)} that exist" if size is not None else ""]
        if size is None and calculated:
            size, sources[1] = calculated / total, "bytes: calculated"
        if kind == "merge_nodes" and size is not None and sources[1] != "bytes: calculated":
            size *= sum(each.inner_nodes for each in forecasts) / total  # roots are stored as merges
        stages.append(
            Stage(
                kind,
                None if seconds is None else seconds * make / max(1, min(workers, make)),
                None if size is None else round(size * make),
                "; ".join(filter(None, sources)) or "nothing measured yet",
            )
        )
    return Estimate(slots, tuple(stages))


def _seconds(kind: str, own: Sequence[Manifest], results: Sequence[Results]) -> tuple[float | None, str]:
    """Mean seconds of one, and where that is from."""
    once = {(m.meta.get("label"), m.meta["seconds"]) if m.kind == "merged" else m.key: m.meta["seconds"]
            for m in own if "seconds" in m.meta}  # fmt: skip
    if once:
        return _mean(list(once.values())), f"time: mean of {len(once)} that exist"
    for run in results if kind in _OF_RUN else ():
        made, seconds = _OF_RUN[kind](run)
        if made:
            return seconds / made, f"time: run {run.run_id[:8]}"
    return None, ""


# -- experts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rate:
    """What an expert took: seconds for a token, and seconds beside training."""

    per_token: float
    beside: float

    @staticmethod
    def of(trained: Manifest) -> "_Rate | None":
        meta = trained.meta
        if (
            trained.kind not in ("expert", "refined", "multitask")
            or not meta.get("tokens")
            or not meta.get("train_seconds")
        ):
            return None
        return _Rate(meta["train_seconds"] / meta["tokens"], max(0.0, meta.get("seconds", 0) - meta["train_seconds"]))


def _experts(
    forecasts: Sequence[Forecast], before: Mapping[str, Manifest], found: Sequence[Manifest], cost: Cost, slots: int,
    flops: Callable[[], float],
) -> Stage:  # fmt: skip
    """Each expert at the speed of the one before; else of the suite's others; else of this machine. One round begins
    when the one before is over."""
    experts = [manifest for manifest in [*found, *before.values()] if manifest.kind == "expert"]
    known = [rate for manifest in experts if (rate := _Rate.of(manifest))]
    rounds = zip(*(each.rounds or (each.stale,) for each in forecasts), strict=True)
    count = forecasts[0].inputs.config.rounds.count
    seconds, size, existing, sources = 0.0, 0.0, 0, Counter[str]()
    speed = 0.0
    for number, stale in enumerate(rounds, 1):
        tasks, durations = [task for each in stale for task in each], []
        for task in tasks:
            tokens, own = cost.expert_tokens[task] / count, _Rate.of(before[task]) if task in before else None
            if own is not None:
                durations.append(own.per_token * tokens + own.beside)
                sources["the expert before"] += 1
            elif known:
                per_token, beside = (_mean([getattr(rate, name) for rate in known]) for name in ("per_token", "beside"))
                durations.append((per_token or 0) * tokens + (beside or 0))
                sources["other experts"] += 1
            else:
                speed = speed or flops()
                durations.append(cost.seconds(1, speed) * tokens / sum(cost.expert_tokens.values()))
                sources[f"calculated, at {speed / 1e9:.0f} GFLOP/s a slot"] += 1
        seconds += spread(durations, slots)
        sizes = [_size(manifest) for manifest in experts if _round(manifest) == number]
        existing += len(sizes) if tasks else 0
        size += len(tasks) * (_mean(sizes) or cost.expert_bytes(number, count))
    time = ", ".join(f"{source} ({count})" for source, count in sources.items())
    bytes_from = f"mean of {existing} that exist" if existing else "calculated"
    return Stage("experts", seconds, round(size), f"time: {time}; bytes: {bytes_from}")


def _round(expert: Manifest) -> int:
    return int(dict(expert.config.get("round", {})).get("number", 1))


def _mixed(
    kind: str, make: int, before: Mapping[str, Manifest], found: Sequence[Manifest], cost: Cost, slots: int,
    flops: Callable[[], float],
) -> Stage:  # fmt: skip
    """Trainings on rows of all tasks at the speed of those before; else of experts; else of this machine. Which numbers
    of steps are missing is not asked: the mean of all."""
    need = cost.mixed[kind]
    own = [manifest for manifest in found if manifest.kind in _MANIFESTS[kind]]
    for source, manifests in (("those that exist", own), ("experts", [*found, *before.values()])):
        if rates := [rate for manifest in manifests if (rate := _Rate.of(manifest))]:
            per_token, beside = (_mean([getattr(rate, name) for rate in rates]) for name in ("per_token", "beside"))
            seconds, time = (per_token or 0) * need.tokens + (beside or 0), f"time: {source}, by tokens"
            break
    else:
        seconds = cost.seconds(1, flops()) * need.tokens / sum(cost.expert_tokens.values())
        time = "time: calculated"
    size = _mean([_size(manifest) for manifest in own])
    bytes_from = "calculated" if size is None else f"mean of {len(own)} that exist"
    size = need.file_bytes if size is None else size
    return Stage(kind, spread([seconds] * make, slots), round(size * make), f"{time}; bytes: {bytes_from}")


def spread(durations: Iterable[float], slots: int) -> float:
    """Seconds until all are done, the longest first, each on the slot that is free first."""
    ends = [0.0] * max(1, slots)
    for duration in sorted(durations, reverse=True):
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def _size(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files.values())


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# -- slots ------------------------------------------------------------------------------------------------------


def find_slots(resources: ResourcesConfig, results: Sequence[Results]) -> Slots:
    """Slots of the Ray cluster that the environment names, else of the suite's latest run, else of this machine alone.
    Starts nothing and joins nothing."""
    nodes = _ray_nodes() if os.environ.keys() & {"RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"} else []
    if nodes:
        source = "the Ray cluster"
    elif results and results[0].slots:
        slots = results[0].slots
        return Slots(slots, slots, f"run {results[0].run_id[:8]}; no Ray cluster answered")
    else:
        memory = psutil.virtual_memory().total
        nodes = [{"Alive": True, "Resources": {"CPU": os.cpu_count() or 1, "memory": memory}}]
        source = "this machine alone; no Ray cluster answered"
    return Slots(slots_of(nodes, resources.expert), slots_of(nodes, resources.evaluator), source)


def _ray_nodes() -> list[dict[str, Any]]:
    """The cluster's nodes as `ray.nodes()` gives them, from Ray's dashboard; none if it does not answer."""
    from ray.util.state import list_nodes  # not above: only where a cluster is named

    try:
        address = os.environ.get("RAY_API_SERVER_ADDRESS")
        if not address:
            check_answers(os.environ.get("RAY_ADDRESS", ""), seconds=5)  # Ray itself would look for it for long
        listed = list_nodes(address=address, detail=True, timeout=_SECONDS, raise_on_missing_output=False)
    except Exception:  # whatever Ray raises: an estimate is worth no failure, and says what it rests on
        return []
    return [{"Alive": node.state == "ALIVE", "Resources": node.resources_total or {}} for node in listed]
