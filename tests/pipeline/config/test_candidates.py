"""Merge candidates of a configuration: lists, weights, what is left out, what is refused, and the plan in words."""

from typing import Any

import pytest
from pydantic import ValidationError

from infra.errors import ConfigError, FactoryError, MergeError
from merge.methods.specs import Candidate
from pipeline.config.candidates import Candidates, list_candidates, merge_plan
from pipeline.config.model import PipelineConfig

TASK = {"source": "jsonl:rows.jsonl", "metric": "exact_match", "template": "{input}?"}


def config(entries: list[dict[str, Any]], search: int | None = None, **sections: Any) -> PipelineConfig:
    given: dict[str, Any] = {
        "suite": "mine",
        "base": "path:/nowhere",
        "held_in": {"one": TASK, "two": TASK},
        "train": {"steps": 3},
        "merge": {"candidates": entries, "search": {"evaluations": search}},
    }
    return PipelineConfig.model_validate(given | sections)


def listed(*entries: dict[str, Any], **sections: Any) -> tuple[Candidate, ...]:
    return list_candidates(config(list(entries), **sections)).all


def test_lists_of_parameters_become_one_candidate_each_in_order() -> None:
    found = listed(
        {"method": "task_arithmetic", "params": {"lambda": [0.3, 0.1]}},
        {"method": "mean"},
        {"method": "ties", "params": {"lambda": [1.0, 0.5], "density": [0.2, 0.8]}},
        {"method": "ties", "params": {"density": 0.5, "density_of": ["support", "tensor"]}},
    )
    assert found == (
        Candidate("task_arithmetic", {"lambda": 0.3}),
        Candidate("task_arithmetic", {"lambda": 0.1}),
        Candidate("mean"),
        Candidate("ties", {"lambda": 1.0, "density": 0.2}),
        Candidate("ties", {"lambda": 1.0, "density": 0.8}),
        Candidate("ties", {"lambda": 0.5, "density": 0.2}),
        Candidate("ties", {"lambda": 0.5, "density": 0.8}),
        Candidate("ties", {"density": 0.5, "density_of": "support"}),
        Candidate("ties", {"density": 0.5, "density_of": "tensor"}),
    )


def test_what_is_named_twice_is_tried_once_where_it_was_named_first() -> None:
    found = listed(
        {"method": "ties", "params": {"lambda": [1, 0.5, 1.0]}},
        {"method": "mean"},
        {"method": "ties", "params": {"density": 1.0}},  # the defaults are those of the first
        {"method": "mean"},
    )
    assert found == (Candidate("ties"), Candidate("ties", {"lambda": 0.5}), Candidate("mean"))


def test_weights_are_given_listed_or_in_proportion_to_the_training_rows() -> None:
    given = {"one": 0.25, "two": 0.75}
    entries = [{"method": "weighted_mean", "weights": [given, "training_rows"]}]
    chosen = config(entries)
    assert list_candidates(chosen, {"one": 300, "two": 100}).all == (
        Candidate("weighted_mean", {}, given),
        Candidate("weighted_mean", {}, {"one": 0.75, "two": 0.25}),
    )
    assert listed({"method": "ties", "weights": given, "params": {"lambda": [1, 2]}}) == tuple(
        Candidate("ties", {"lambda": scale}, given) for scale in (1, 2)
    )


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"method": "men"}, r"did you mean 'mean'"),
        ({"method": "ties", "params": {"lamda": 1}}, r"did you mean 'lambda'"),
        ({"method": "ties", "params": {"density": [0.5, 1.5]}}, r"density.*1\.5"),
        ({"method": "ties", "params": {"density_of": "whole"}}, r"density_of.*support, tensor"),
        ({"method": "sce_selection"}, r"a step of other methods"),
        ({"method": "weighted_mean"}, r"weights .* are missing: give one for each of one, two"),
        ({"method": "weighted_mean", "weights": {"one": 1.0}}, r"lack two"),
        ({"method": "weighted_mean", "weights": {"one": 0.5, "tow": 0.5}}, r"name 'tow', .*did you mean 'two'"),
        ({"method": "weighted_mean", "weights": {"one": 0.5, "two": 0.6}}, r"sum to 1\.1"),
        ({"method": "mean", "weights": "training_rows"}, r"takes no weights"),
        ({"method": "ties", "weights": {"one": 1, "two": -1}}, r"-1.*from 0"),
        ({"method": "consensus", "params": {"at_least": [2, 3]}}, r"at_least.* is 3, but 2 experts"),
        ({"method": "emr"}, r"needs the task at inference .*emr.*add another"),
    ],
)
def test_a_wrong_candidate_is_refused(entry: dict[str, Any], expected: str) -> None:
    with pytest.raises(FactoryError, match=expected):
        listed(entry)


def test_a_yaml_boolean_is_no_number() -> None:
    entries: list[dict[str, Any]] = [
        {"method": "ties", "params": {"lambda": True}},
        {"method": "ties", "params": {"lambda": [0.5, True]}},
        {"method": "ties", "weights": {"one": True, "two": 1}},
        {"method": "ties", "weights": [{"one": 1, "two": False}]},
        {"method": "ties", "weights": {"one": "1", "two": 1}},
    ]
    for entry in entries:
        with pytest.raises((ValidationError, FactoryError)):
            listed(entry)
    assert listed({"method": "ties", "weights": {"one": 1, "two": 2}, "params": {"lambda": 1}})


def test_an_empty_list_of_values_or_weights_is_refused() -> None:
    for entry in ({"params": {"lambda": []}}, {"weights": []}, {"weights": "rows"}):
        with pytest.raises(ValidationError, match=r"at least 1 item|training_rows"):
            config([{"method": "ties", **entry}])


@pytest.mark.parametrize("section", [{"expert": "lora"}, {"expert": "full"}, {"mask": {"shared": True}}])
def test_overlap_mean_is_left_out_where_it_equals_mean(section: dict[str, Any]) -> None:
    weights = {"one": 0.25, "two": 0.75}
    entries = [
        {"method": "overlap_mean"},
        {"method": "overlap_mean", "weights": weights},
        {"method": "mean"},
        {"method": "weighted_mean", "weights": weights},
    ]
    found = list_candidates(config(entries, **section))
    assert found.all == (Candidate("mean"), Candidate("weighted_mean", {}, weights))
    assert found.notes[0] == "overlap_mean is left out: all experts hold the same positions, where it equals mean"
    assert len(found.notes) == 2
    alone = list_candidates(config(entries[:1], **section))
    assert (alone.all, alone.notes) == ((Candidate("overlap_mean"),), ())
    assert len(listed(*entries)) == 4


def test_methods_that_need_the_task_are_set_apart() -> None:
    found = Candidates((Candidate("mean"), Candidate("emr"), Candidate("tall")))
    assert found.eligible == (Candidate("mean"),)
    assert found.per_task == (Candidate("emr"), Candidate("tall"))


def test_a_budget_counts_only_what_can_be_chosen() -> None:
    entries = [{"method": "mean"}, {"method": "magmax"}, {"method": "emr"}]
    assert len(list_candidates(config(entries, 3)).all) == 3
    with pytest.raises(ConfigError, match=r"evaluations is 2, too few to choose among 2 .* at least 3 .* 4 score"):
        list_candidates(config(entries, 2))


def test_the_plan_in_words() -> None:
    chosen = config([{"method": "mean"}, {"method": "consensus"}, {"method": "emr"}], 3)
    plan = merge_plan(chosen, list_candidates(chosen))
    assert "3 candidates, 3 of 4 validation scores to choose among 2" in plan
    assert "2 on 1, 1 on 1" in plan
    assert "2 rounds" in plan
    assert "re-lift every expert" in plan
    assert "emr: needs the task at inference; 2 further scores, never chosen" in plan
    lora = config([{"method": "mean"}, {"method": "overlap_mean"}], expert="lora")
    assert merge_plan(lora, list_candidates(lora)).endswith("where it equals mean")
    with pytest.raises(MergeError):
        list_candidates(config([{"method": "men"}]))


@pytest.mark.parametrize("given", [{}, {"merge": {"fan_in": 4}}])
def test_without_a_word_each_family_of_methods_is_tried(given: dict[str, Any]) -> None:
    fields = config([{"method": "mean"}]).model_dump(by_alias=True, exclude={"merge"}, exclude_unset=True) | given
    found = list_candidates(PipelineConfig.model_validate(fields))
    assert [each.method for each in found.eligible] == ["mean", "ties", *["iso_c"] * 2, *["spectral_power"] * 3]


def test_what_is_refined_is_told_and_there_must_be_so_many() -> None:
    entries = [{"method": "mean"}, {"method": "magmax"}, {"method": "emr"}]
    chosen = config(entries, refine={"merges": 2, "steps": [10, 40], "rows_per_task": 3})
    plan = merge_plan(chosen, list_candidates(chosen))
    assert "refining: the best 2 of them, each by 10, 40 steps of 6 training rows; 8 further validation scores" in plan
    assert "refining" not in merge_plan(config(entries), list_candidates(config(entries)))
    with pytest.raises(ConfigError, match=r"refine.merges is 3, but merge.candidates lists 2 that can be chosen"):
        list_candidates(config(entries, refine={"merges": 3}))
