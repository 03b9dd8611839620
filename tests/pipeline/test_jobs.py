"""What jobs say about licences: in every manifest, in no key."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from infra.artifacts import Manifest, Recipe
from infra.store import FileRef, Store
from pipeline.jobs import evaluation_job, expert_job, importance_job, support_job
from tests.pipeline.test_planning import inputs

RECIPE = Recipe("any", 1, {})
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
    assert importance_job(given, "task1", Recipe("fisher", 1, {}), EXPERT).provenance == of_task1
    assert expert_job(given, "task1", RECIPE, None).provenance == of_task1
    assert support_job(given, RECIPE).provenance == {"licenses": {"base": ["none"], "data": ["cc0-1.0", "mit"]}}
    other = evaluation_job(given, "champion", "gate", "task1", EXPERT, EXPERT, base_sha256="c" * 64)
    assert other.provenance == {"base": {"sha256": "c" * 64}, "data": of_task1["data"]}
    relicensed = replace(given, tasks={name: replace(data, license="gpl-3.0") for name, data in tasks.items()})
    again = evaluation_job(relicensed, "expert", "test", "task1", EXPERT, EXPERT)
    assert again.provenance != scored.provenance
    assert again.recipe == scored.recipe
