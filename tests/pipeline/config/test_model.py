"""Configuration: what is refused, with which message, and what an override does."""

from pathlib import Path

import pytest

from infra.errors import ConfigError
from pipeline.config.candidates import list_candidates
from pipeline.config.model import dump_config, load_config

CONFIGS = Path(__file__).resolve().parents[3] / "pipeline" / "configs"


@pytest.mark.parametrize(("name", "tasks"), [("quickstart.yaml", 20), ("flan20.yaml", 20), ("classification.yaml", 4)])
def test_shipped_configurations_load_and_survive_a_round_trip(name: str, tasks: int, tmp_path: Path) -> None:
    config = load_config(CONFIGS / name)
    assert len(config.held_in) == tasks
    assert list_candidates(config).eligible  # methods, parameters and budget are accepted
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_overrides_replace_fields_also_inside_lists_and_tasks() -> None:
    config = load_config(
        CONFIGS / "quickstart.yaml",
        ["train.steps=7", "merge.candidates[0].method=ties", "held_in.vitaminc.metric=exact_match", "mask.density=0.1"],
    )
    assert (config.train.steps, config.merge.candidates[0].method) == (7, "ties")
    assert (config.held_in["vitaminc"].metric, config.mask.density) == ("exact_match", 0.1)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=0.1", ["train.learning_rat", "did you mean 'learning_rate'"]),
        ("trian.steps=3", ["trian", "did you mean 'train'"]),
        ("held_in.vitaminc.metrik=rouge_l", ["held_in.vitaminc.metrik", "did you mean 'metric'"]),
        ("merge.candidates[0].params2={}", ["merge.candidates.0.params2", "did you mean 'params'"]),
        ("train.steps=abc", ["train.steps", "integer", "'abc'"]),
        ("train.steps=-1", ["train.steps", "greater than 0", "-1"]),
        ("mask.reselect_every=5", ["mask", "criterion random takes no data"]),
        ("mask.keep=smallest", ["mask", "smallest is not accepted with criterion random"]),
        ("mask.granularity=column3", ["mask.granularity", "'n_m'", "column3"]),
        ("expert=lora2", ["expert", "'lora'", "lora2"]),
        ("lora.rank=0", ["lora.rank", "greater than 0"]),
        ("seeds=[1,1]", ["seeds: every seed once"]),
        ("train.patience=2 && train.validate_every=null", ["train", "give validate_every as well"]),
        ("mask.shared=true && expert=lora", ["mask.shared is for sparse experts"]),
        ("objective=classification", ["has metric choice_accuracy; classification takes accuracy, f1, matthews"]),
        ("held_in.vitaminc.metric=f1", ["vitaminc has metric f1; language_modelling takes exact_match"]),
        ("mask.density=1.5", ["mask.density", "less than or equal to 1"]),
        ("mask.criterion=magic", ["mask.criterion", "random", "connection_sensitivity"]),
        ("held_in.vitaminc.source=ftp:x", ["held_in.vitaminc.source", "bigbench:<task>", "jsonl:<path"]),
        ("held_in.vitaminc.template=none", ["held_in.vitaminc.template", "{input}"]),
        ("prompt.wrapper=none", ["prompt.wrapper", "{prompt}"]),
        ("train.epochs=2", ["train", "exactly one of steps and epochs"]),
        ("merge.search.evaluations=0", ["merge.search.evaluations", "greater than 0"]),
        ("merge.search.budget=9", ["merge.search.budget", "accepted: evaluations"]),
        ("merge.export.dtype=float16", ["merge.export.dtype", "'float32' or 'bfloat16'"]),
        ("merge.candidates[0].weights=equal", ["merge.candidates.0.weights", "training_rows"]),
        ("merge.importance_rows=0", ["merge.importance_rows", "greater than 0"]),
        ("resources.node_tasks=0", ["resources.node_tasks", "greater than 0"]),
        ("merge.fan_in=3", ["merge.fan_in", "2, 4, 8 or 16"]),
        ("no-equals-sign", ["no-equals-sign", "section.field=value"]),
    ],
)
def test_a_wrong_field_is_named_with_what_is_accepted(override: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "quickstart.yaml", override.split(" && "))
    for part in expected:
        assert part in str(caught.value)


def test_every_wrong_field_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "quickstart.yaml", ["train.steps=0", "mask.density=0", "sed=1"])
    assert all(field in str(caught.value) for field in ("train.steps", "mask.density", "sed"))


def test_one_task_cannot_be_held_in_and_held_out() -> None:
    task = "{source: 'bigbench:hyperbaton', metric: choice_accuracy}"
    with pytest.raises(ConfigError, match="both in held_in and in held_out: hyperbaton"):
        load_config(CONFIGS / "quickstart.yaml", [f"held_out.hyperbaton={task}"])


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*quickstart\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("suite: [unclosed")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(broken)
    listed = tmp_path / "list.yaml"
    listed.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"list\.yaml"):
        load_config(listed)
