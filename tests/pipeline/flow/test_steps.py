"""What jobs say about licences: in every manifest, in no key."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from infra.artifacts.manifests import Manifest
from infra.store.s3 import FileRef, Store
from pipeline.flow.steps import evaluation_job, expert_step, measurement_step, support_step
from tests.pipeline.given import inputs
from workers.jobs.expert import ExpertJob
from workers.jobs.measurement import MeasurementJob
from workers.jobs.shared_support import SupportJob

EXPERT = Manifest("e" * 64, "expert", 1, {}, {"adapter": FileRef("objects/e/1/adapter", "s", 1)}, {}, {})


def test_jobs_carry_licences_outside_their_keys(store: Store) -> None:
    given = inputs(store, 2)
    licences = {"task0": "mit", "task1": "cc0-1.0", "other": "mit"}
    tasks = {name: replace(data, license=licences[name]) for name, data in given.tasks.items()}
    given = replace(given, tasks=tasks)
    of_task1: Mapping[str, Any] = {
        "base": {"name": "tiny", "license": "none"},
        "data": {"source": "jsonl:rows.jsonl", "license": "cc0-1.0"},
    }
    scored = evaluation_job(given, "expert", "test", "task1", EXPERT, EXPERT)
    assert scored.provenance == of_task1
    measured, trained = measurement_step(given, "task1", "fisher", EXPERT).call, expert_step(given, "task1", None).call
    assert isinstance(measured, MeasurementJob)
    assert isinstance(trained, ExpertJob)
    assert measured.provenance == trained.provenance == of_task1
    mask = given.config.mask.model_copy(update={"shared": True, "criterion": "gradient", "reselect_every": None})
    shared = support_step(replace(given, config=given.config.model_copy(update={"mask": mask})))
    assert shared is not None
    assert isinstance(shared.call, SupportJob)
    assert shared.call.provenance == {"licenses": {"base": ["none"], "data": ["cc0-1.0", "mit"]}}
    other = evaluation_job(given, "champion", "gate", "task1", EXPERT, EXPERT, base_sha256="c" * 64)
    assert other.provenance == {"base": {"sha256": "c" * 64}, "data": of_task1["data"]}
    relicensed = replace(given, tasks={name: replace(data, license="gpl-3.0") for name, data in tasks.items()})
    again = evaluation_job(relicensed, "expert", "test", "task1", EXPERT, EXPERT)
    assert again.provenance != scored.provenance
    assert again.recipe == scored.recipe
