"""results.json as a typed model: files of earlier runs read and write the same, and programs get a schema."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.__main__ import main
from pipeline.records.results import Results, readable, scores
from pipeline.records.seed_results import SeedChoice

HERE = Path(__file__).parent
STORED = {name: (HERE / f"{name}.json").read_text(encoding="utf-8") for name in ("quickstart", "exported")}
"""Of a run of the quickstart, with few of its tasks and candidates; of a run with a checkpoint and task masks."""
LATER = ("bytes", "swap_seconds")
"""Fields of `chosen` that came after the gate."""


@pytest.mark.parametrize("name", STORED)
def test_a_stored_file_is_written_as_it_was(name: str) -> None:
    assert Results.model_validate_json(STORED[name]).to_json() == STORED[name]


def test_a_file_of_an_earlier_version_is_written_as_it_was() -> None:
    earlier = json.loads(STORED["quickstart"])
    del earlier["learned_elsewhere"]
    earlier["chosen"] = {name: value for name, value in earlier["chosen"].items() if name not in LATER}
    found = Results.model_validate(earlier)
    assert json.loads(found.to_json()) == earlier
    assert (found.learned_elsewhere, found.chosen.bytes, found.chosen.swap_seconds) == ({}, 0, None)


def test_what_a_later_version_adds_is_kept() -> None:
    later = json.loads(STORED["quickstart"])
    later["more"] = {"numbers": [1, 2.5]}
    later["held_in"]["past_tense"]["joules"] = 3
    assert json.loads(Results.model_validate(later).to_json()) == later


@given(st.dictionaries(st.sampled_from(["p", "lambda", "at_least"]), st.integers() | st.floats(-9, 9) | st.text()))
def test_parameters_keep_their_types(params: dict[str, Any]) -> None:
    choice = SeedChoice.model_validate_json(json.dumps({"method": "ties", "params": params}))
    found = json.loads(json.dumps(choice.model_dump(exclude_unset=True)))["params"]
    assert [(name, type(value), value) for name, value in found.items()] == [
        (name, type(value), value) for name, value in params.items()
    ]


@pytest.mark.parametrize(
    ("field", "value"), [("slots", "many"), ("slot_utilisation", float("nan")), ("objective", "guessing")]
)
def test_what_is_no_result_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Results.model_validate(json.loads(STORED["quickstart"]) | {field: value})


def test_values_do_not_change() -> None:
    found = Results.model_validate_json(STORED["quickstart"])
    with pytest.raises(ValidationError, match="frozen"):
        found.slots = 3


def test_damaged_files_are_left_out_and_the_order_stays() -> None:
    one, other = (text.encode() for text in STORED.values())
    found = readable([b"{", one, b"{}", b"\xff", other])
    assert [each.to_json().encode() for each in found] == [one, other]


def test_scores_are_those_that_a_row_has_in_the_order_of_the_table() -> None:
    found = Results.model_validate_json(STORED["quickstart"])
    models = ["base", "base_few_shot", "expert", "merged", "merged_serving"]
    assert list(scores(found.summary.held_in)) == models
    assert list(scores(found.held_out["webnlg_en"])) == ["base", "base_few_shot", "merged"]


def test_the_schema_explains_every_field_and_asks_for_what_is_always_there() -> None:
    done = CliRunner().invoke(main, ["results-schema"])
    assert done.exit_code == 0, done.output
    schema = json.loads(done.output)
    sections = [schema, *schema["$defs"].values()]
    unexplained = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section["properties"].items()
        if not field.get("description")
    ]
    assert unexplained == []
    assert {"run_id", "held_in", "summary", "chosen", "gate", "made"} <= set(schema["required"])
    assert not {"seeds", "learned_elsewhere"} & set(schema["required"])


@pytest.mark.parametrize("name", STORED)
def test_the_schema_names_every_field_of_a_stored_file(name: str) -> None:
    """So what the schema says is what the file has; unknown names would be kept, but not explained."""
    found = Results.model_validate_json(STORED[name])
    assert _unknown(found) == []


def _unknown(part: Any) -> list[str]:
    if isinstance(part, Mapping):
        return [name for value in part.values() for name in _unknown(value)]
    if isinstance(part, tuple):
        return [name for value in part for name in _unknown(value)]
    if not hasattr(part, "model_extra"):
        return []
    return [*part.model_extra, *(name for _, value in part for name in _unknown(value))]
