"""What Ray is asked for: workers, retries, and how long a cluster is waited for. None of it is part of a key."""

import math
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from pipeline.config.section import Section
from pipeline.data.fields import Natural, Number, Positive

GIB = 1 << 30
_LEAST_SHARE = 1e-4
"""Of a CPU or GPU, that Ray can tell from none."""


def _divisible(value: float) -> float:
    if 0 < value < _LEAST_SHARE:
        raise ValueError(f"Ray counts in steps of {_LEAST_SHARE:g}: give 0, or at least that")
    return value


class WorkerResources(Section):
    """What Ray reserves for one worker."""

    cpus: Annotated[Number, Field(ge=0), AfterValidator(_divisible)] = 1
    """CPUs; torch uses as many threads (at least one)."""
    gpus: Annotated[Number, Field(ge=0), AfterValidator(_divisible)] = 0
    """GPUs: a whole number, or a fraction of one."""
    memory_gib: Annotated[Number, Field(ge=0.001)] = 3.0
    """Memory in GiB."""

    @field_validator("gpus")
    @classmethod
    def _whole_or_shared(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError(
                f"Ray gives a worker a whole number of GPUs or a fraction of one: {math.floor(value)} or "
                f"{math.ceil(value)}, or less than 1"
            )
        return value


class ResourcesConfig(Section):
    """Resources and retries. None of this is part of a key: changing it never retrains anything."""

    expert: WorkerResources = WorkerResources()
    """One expert's training."""
    evaluator: WorkerResources = WorkerResources()
    """One evaluation actor."""
    refine: WorkerResources | None = None
    """One training of a merge on rows of all tasks; null: as an expert's."""
    node: WorkerResources = WorkerResources(cpus=0, memory_gib=1.5)
    """One merge node; 0 CPUs, so that merging never keeps an expert waiting."""
    node_tasks: Positive = 1
    """Has no effect any more, and is accepted so that earlier configurations load: a node is one task."""
    concurrent_nodes: Positive = 2
    """Ray tasks of merge nodes at a time."""
    concurrent_registrations: Positive = 2
    """Registrations in MLflow at a time."""
    retries: Annotated[Natural, Field(le=10_000)] = 3
    """How often a task is started again after its worker or node was lost."""
    cluster_wait_seconds: Annotated[Number, Field(ge=0, le=86_400)] | None = None
    """How long a run waits until the Ray cluster has a node for every kind of worker; its autoscaler is asked for them.
    Then the run is refused. Null: 600 where no node has a CPU yet (a cluster that scales from zero), else 0."""
    lease_seconds: Annotated[Number, Field(ge=3, le=3600)] = 60.0
    """Seconds without a heartbeat after which another run takes over what a worker was making; it beats six times in
    that time."""

    @property
    def refining(self) -> WorkerResources:
        """What refining may use."""
        return self.refine or self.expert
