"""Keys change exactly when something that the artifact is a function of changes."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from infra.artifacts.manifests import Recipe
from infra.errors import ConfigError
from pipeline.config.expert_kinds import EXPERT_KINDS, shares_scored_support
from pipeline.config.model import PipelineConfig, load_config
from pipeline.config.refine import RefineConfig
from pipeline.data.tasks import TaskConfig, TaskData, fingerprint
from pipeline.flow.recipes import (
    evaluation_recipe,
    expert_recipe,
    expert_spec,
    experts_rows,
    measurement_recipe,
    multitask_refining,
    pooled_order,
    refine_mask,
    refine_recipe,
    refine_train,
    rows_read,
    support_recipe,
    teacher_recipe,
    train_spec,
)
from workers.measuring.file import IMPORTANCE_FILE_VERSION
from workers.scoring.likelihood import EvaluateSpec
from workers.text.rows import Row
from workers.training.batches import mixed_batches
from workers.training.kinds import kind_name

CONFIG = Path(__file__).resolve().parents[3] / "pipeline" / "configs" / "quickstart.yaml"
BASE = "a" * 64


def data(text: str = "x", template: str = "{input}", name: str = "task", test: str = "t") -> TaskData:
    splits = {
        "train": tuple(Row(str(i), f"{text}{i}", ("y",)) for i in range(20)),
        "validation": (Row("v", "v", ("y",)),),
        "gate": (Row("g", "g", ("y",)),),
        "test": (Row("t", test, ("y",)),),
    }
    config = TaskConfig(source="jsonl:rows.jsonl", template=template, metric="exact_match")
    return TaskData(name, config, splits, {split: fingerprint(rows) for split, rows in splits.items()})


def key(*overrides: str, base: str = BASE, task: TaskData | None = None) -> str:
    return expert_recipe(load_config(CONFIG, list(overrides)), base, task or data()).key


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=31", "train.batch_size=4", "train.learning_rate=0.1", "train.weight_decay=0.1",
        "train.warmup_ratio=0.5", "train.schedule=cosine", "train.clip_norm=2", "train.validate_every=3",
        "train.compute_dtype=bfloat16", "train.value_dtype=float32", "seed=1", "mask.density=0.1",
        "mask.criterion=connection_sensitivity", "mask.granularity=element", "mask.block_size=[8, 8]",
        "mask.modules='.*q_proj'", "mask.budget=global", "train.micro_batch_size=2",
        "train.patience=3", "prompt.max_input_tokens=50", "prompt.max_target_tokens=9",
        "prompt.wrapper='{prompt}:'",
    ],
)  # fmt: skip
def test_what_training_depends_on_changes_the_key(override: str) -> None:
    assert key(override) != key()


@pytest.mark.parametrize(
    "override",
    [
        "suite=other", "resources.expert.cpus=2", "resources.expert.memory_gib=9", "resources.retries=0",
        "resources.concurrent_nodes=5", "resources.node_tasks=2", "train.gradient_checkpointing=true",
        "train.checkpoint_every=5", "evaluate.batch_size=3", "evaluate.few_shot=0", "merge.fan_in=2",
        "merge.candidates=[{method: mean}]", "merge.search.evaluations=99", "merge.export={}",
        "held_in.vitaminc.metric=exact_match", "held_in.vitaminc.license=mit",
    ],
)  # fmt: skip
def test_what_training_does_not_depend_on_leaves_the_key(override: str) -> None:
    assert key(override) == key()


def test_data_template_and_base_are_in_the_key_names_and_test_rows_are_not() -> None:
    assert key(task=data("z")) != key()
    assert key(task=data(template="Q: {input}")) != key()
    assert key(base="b" * 64) != key()
    assert key(task=data(name="another")) == key()
    assert key(task=data(test="other")) == key()


def refined_key(*overrides: str, base: str = BASE, steps: int = 10, start: str = "m", **changed: TaskData) -> str:
    config = load_config(CONFIG, ["refine={}", *overrides])
    tasks = {name: data(name, name=name) for name in config.held_in} | changed
    assert config.refine is not None
    others = {name: data(f"{name} kept", name=name) for name in config.kept}
    experts = {name: f"expert of {name}" for name in config.held_in}
    return refine_recipe(config, config.refine, base, {**others, **tasks}, steps, start, experts).key


@pytest.mark.parametrize(
    "override",
    [
        "refine.rows_per_task=2", "refine.learning_rate=0.1", "refine.support=merge", "refine.seed=1", "seed=1",
        "refine.mask.density=0.1", "mask.density=0.1", "mask.block_size=[8, 8]", "refine.compute_dtype=bfloat16",
        "train.weight_decay=0.1", "train.warmup_ratio=0.5", "train.schedule=cosine", "train.clip_norm=2",
        "train.batch_size=4", "train.micro_batch_size=2", "prompt.max_input_tokens=50", "prompt.max_target_tokens=9",
        "prompt.wrapper='{prompt}:'", "refine.support=both",
    ],
)  # fmt: skip
def test_what_refining_depends_on_changes_the_key(override: str) -> None:
    assert refined_key(override) != refined_key()


@pytest.mark.parametrize(
    "override",
    [
        "suite=other", "resources.refine.cpus=2", "resources.expert.memory_gib=9", "resources.retries=0",
        "train.gradient_checkpointing=true", "train.checkpoint_every=5", "evaluate.batch_size=3", "merge.fan_in=2",
        "merge.candidates=[{method: mean}]", "refine.merges=2", "refine.steps=[10, 40]", "refine.seed=0",
        "train.steps=7", "train.learning_rate=0.1", "train.compute_dtype=bfloat16", "train.value_dtype=float32",
    ],
)  # fmt: skip
def test_what_refining_does_not_depend_on_leaves_the_key(override: str) -> None:
    assert refined_key(override) == refined_key()


KEEP = "refine.keep={tasks: {kept: {source: 'jsonl:kept.jsonl', metric: exact_match}}}"
TAUGHT = ("refine.teacher=experts", KEEP)


def test_merges_that_nobody_teaches_have_the_keys_that_they_had() -> None:
    """Of the release before there were teachers."""
    assert refined_key() == "0ad368b7a6912b4fc1d40dab8a8f635eb3c5a21db733ec8339bee2806c234744"
    assert (
        refined_key("refine.teacher_weight=0.1", "refine.top_k=3", "evaluate.compute_dtype=bfloat16") == refined_key()
    )


@pytest.mark.parametrize(
    "override",
    [
        "refine.teacher_weight=0.1", "refine.top_k=3", "refine.teacher=null", "refine.keep=null",
        "refine.keep.weight=2", "refine.keep.rows_per_step=3",
        "evaluate.compute_dtype=bfloat16", "refine.rows_per_task=2",
    ],
)  # fmt: skip
def test_what_teachers_say_depends_on_changes_the_key(override: str) -> None:
    assert refined_key(*TAUGHT, override) != refined_key(*TAUGHT)


def test_a_taught_merge_is_a_function_of_the_experts_and_the_kept_rows_and_not_of_their_names() -> None:
    for other in (data("others"), data("kept kept", template="Q: {input}")):
        assert refined_key(*TAUGHT, kept=other) != refined_key(*TAUGHT)
    config = load_config(CONFIG, ["refine={}", *TAUGHT])
    assert config.refine is not None
    tasks = {name: data(name, name=name) for name in (*config.held_in, *config.kept)}
    experts = {name: f"expert of {name}" for name in config.held_in}
    of = [
        refine_recipe(config, config.refine, BASE, tasks, 10, "m", keys).key
        for keys in (experts, experts | {"vitaminc": "another"})
    ]
    assert of[0] != of[1]
    assert refined_key(*TAUGHT, "refine.steps=[10, 40]") == refined_key(*TAUGHT), "what else is asked is not in it"
    renamed = KEEP.replace("kept:", "another:")
    assert refined_key(*TAUGHT[:1], renamed, another=data("kept kept")) == refined_key(*TAUGHT)


def test_teachers_are_asked_of_the_rows_that_are_read_and_of_no_other() -> None:
    config = load_config(CONFIG, ["refine={}", *TAUGHT, "refine.steps=[2, 5]", "refine.keep.rows_per_step=2"])
    refine = config.refine
    assert refine is not None
    tasks = {name: data(name, name=name) for name in (*config.held_in, *config.kept)}
    read = rows_read(config, refine, tasks)
    assert [each.task for each in read] == [*pooled_order(config, tasks), "kept"]
    assert [each.kept for each in read] == [False] * 20 + [True]
    assert [len(each.numbers) for each in read] == [5] * 20 + [10]
    assert all(each.numbers == tuple(sorted(set(each.numbers))) for each in read)
    batches = mixed_batches([[7] * 20] * 20, 1, 5, refine_train(config, refine, 5).seed, 8, [[7] * 20], 2)
    rows = {row for batch in batches for part in batch for row in part}
    assert rows == {20 * at + number for at, each in enumerate(read) for number in each.numbers}
    alone = refine.model_copy(update={"teacher": None})
    assert [each.task for each in rows_read(config, alone, tasks)] == ["kept"]
    assert rows_read(config, alone, tasks) == read[-1:]
    of = {
        teacher_recipe(config, other, base, tasks["kept"], numbers, expert).key
        for other, base, numbers, expert in (
            (refine, BASE, [1, 2], None), (refine, BASE, [1, 2], "expert"), (refine, BASE, [1, 3], None),
            (refine, "b" * 64, [1, 2], None), (refine.model_copy(update={"top_k": 3}), BASE, [1, 2], None),
        )
    }  # fmt: skip
    assert len(of) == 5


def test_a_refined_merge_is_a_function_of_the_merge_and_of_every_tasks_rows_and_prompt() -> None:
    keys = {
        refined_key(), refined_key(base="b" * 64), refined_key(steps=11), refined_key(start="another"),
        refined_key(vitaminc=data("z")), refined_key(vitaminc=data("vitaminc", template="Q: {input}")),
    }  # fmt: skip
    assert len(keys) == 6
    assert refined_key(vitaminc=data("vitaminc", test="other")) == refined_key()
    config = load_config(CONFIG, ["refine={}", "mask.criterion=fisher", "mask.reselect_every=3"])
    assert config.refine is not None
    mask = refine_mask(config, config.refine)
    assert mask.reselect_every is None
    assert mask.seed not in {expert_spec(config, data(name)).seed for name in config.held_in}


def test_the_multitask_adapter_sees_as_many_rows_as_the_experts_unless_it_is_told() -> None:
    def of(*overrides: str) -> RefineConfig:
        config = load_config(CONFIG, [*overrides])
        found = multitask_refining(config, {name: data(name) for name in config.held_in})
        assert found is not None
        return found

    assert of("yardsticks.multitask={}").steps == [160]  # of 20 rows; experts: 20 of 20 steps of 8 rows
    assert of("yardsticks.multitask.rows_per_task=3").steps == [54]
    assert of("yardsticks.multitask.steps=7", "yardsticks.multitask.seed=3") == RefineConfig(steps=[7], seed=3)
    plain = load_config(CONFIG)
    assert multitask_refining(plain, {}) is None
    tasks = {name: data(name) for name in plain.held_in}
    mixed = RefineConfig()
    keys = {refine_recipe(plain, mixed, BASE, tasks, 10, start).key for start in (None, "m", "n")}
    assert len(keys) == 3
    assert key("yardsticks.multitask={}") == key()


def test_refining_leaves_the_keys_of_experts() -> None:
    assert key("refine={}") == key()


def in_rounds(*overrides: str, number: int = 1, start: str | None = None, support: str | None = None) -> Recipe:
    return expert_recipe(load_config(CONFIG, list(overrides)), BASE, data(), support, number, start)


def test_an_expert_of_the_first_round_is_that_of_a_run_of_one() -> None:
    assert in_rounds("rounds=1").key == key()
    assert in_rounds("rounds=2").key == in_rounds("rounds=4", "train.steps=40").key == key("train.steps=10")
    assert in_rounds("rounds.count=2", "rounds.support=kept", "rounds.merge.method=mean").key == key("train.steps=10")


def test_a_later_expert_is_a_function_of_the_merge_it_starts_from() -> None:
    second = in_rounds("rounds=2", number=2, start="a")
    assert second.inputs == ("a",)
    others = [
        in_rounds("rounds=2", number=2, start="b"),
        in_rounds("rounds=3", "train.steps=30", number=2, start="a"),  # not the last: it has no file for the base
        in_rounds("rounds=3", "train.steps=30", number=3, start="a"),
        in_rounds("rounds.count=2", "rounds.support=kept", number=2, start="a", support="s"),
    ]
    assert len({each.key for each in [second, *others]}) == 5
    first = in_rounds("rounds=2")
    assert {name for name in first.config if first.config[name] != second.config[name]} == {"sparse", "train"}
    assert in_rounds("rounds.count=2", "rounds.merge={method: mean}", number=2, start="a").key == second.key


def test_steps_that_do_not_divide_go_to_the_first_rounds() -> None:
    config = load_config(CONFIG, ["rounds=3"])
    specs = [train_spec(config, data(), number) for number in (1, 2, 3)]
    assert [spec.steps for spec in specs] == [7, 7, 6]
    assert len({spec.seed for spec in specs}) == 3, "other rows in every round"
    assert experts_rows(config, dict.fromkeys(config.held_in, data())) == 20 * 8 * len(config.held_in)
    epochs = config.model_copy(update={"train": config.train.model_copy(update={"steps": None, "epochs": 1.0})})
    with pytest.raises(ConfigError, match="but the expert for task takes 2 optimizer steps in all"):
        train_spec(epochs, data())


def test_licences_are_in_no_key() -> None:
    config, plain, stated = load_config(CONFIG, ["mask.shared=true", "mask.criterion=fisher"]), data(), data()
    stated = replace(stated, license="mit", config=stated.config.model_copy(update={"license": "mit"}))
    assert expert_recipe(config, BASE, stated) == expert_recipe(config, BASE, plain)
    assert measurement_recipe(config, "fisher", BASE, stated) == measurement_recipe(config, "fisher", BASE, plain)
    pools = [dict.fromkeys(config.held_in, each) for each in (plain, stated)]
    assert support_recipe(config, BASE, pools[0]) == support_recipe(config, BASE, pools[1])
    scores = [
        evaluation_recipe(BASE, each, "test", EvaluateSpec(metric="exact_match"), "float32", "float32")
        for each in (plain, stated)
    ]
    assert scores[0] == scores[1]


def test_experts_with_different_rows_get_different_random_masks() -> None:
    config = load_config(CONFIG)
    assert expert_spec(config, data()).seed != expert_spec(config, data("z")).seed
    assert expert_spec(config, data()).seed == expert_spec(config, data(name="another")).seed
    shared = load_config(CONFIG, ["mask.shared=true"])
    assert expert_spec(shared, data()) == expert_spec(shared, data("z"))
    assert not shares_scored_support(shared)


def test_kinds_of_experts_have_keys_of_their_own() -> None:
    keys = [key(), key("expert=lora"), key("expert=full"), key("expert=lora", "lora.rank=8"), key("mask.shared=true")]
    assert len(set(keys)) == len(keys)
    assert key("lora.rank=8") == key()
    assert key("expert=lora", "mask.density=0.5") == key("expert=lora")
    assert key("expert=full", "mask.criterion=magnitude") == key("expert=full")


def test_a_shared_support_is_a_function_of_all_tasks_and_an_input_of_every_expert() -> None:
    overrides = ["mask.shared=true", "mask.criterion=fisher", "mask.score_batches=2"]
    config = load_config(CONFIG, overrides)
    assert shares_scored_support(config)
    tasks = {name: data(name) for name in config.held_in}
    one = support_recipe(config, BASE, tasks)
    first = next(iter(config.held_in))
    assert support_recipe(config, BASE, {**tasks, first: data("changed")}).key != one.key
    assert support_recipe(config, BASE, {**tasks, first: data(first, test="other")}).key == one.key
    assert support_recipe(load_config(CONFIG, [*overrides, "train.steps=7"]), BASE, tasks).key == one.key
    expert = expert_recipe(config, BASE, data(), one.key)
    assert expert.inputs == (one.key,)
    assert expert.key != expert_recipe(config, BASE, data(), "0" * 64).key


def test_an_importance_is_a_function_of_its_expert_and_the_number_of_rows() -> None:
    config, expert = load_config(CONFIG), "1" * 64
    one = measurement_recipe(config, "fisher", expert, data())
    assert one.inputs == (expert,)
    assert one.config["file"] == IMPORTANCE_FILE_VERSION
    assert measurement_recipe(config, "gram", expert, data()).key != one.key
    assert measurement_recipe(config, "fisher", "2" * 64, data()).key != one.key

    def other(override: str) -> str:
        return measurement_recipe(load_config(CONFIG, [override]), "fisher", expert, data()).key

    assert other("merge.importance_rows=7") != one.key
    assert other("merge.importance_rows=19") != other("merge.importance_rows=20")
    assert other("merge.importance_rows=20") == other("merge.importance_rows=21")  # there are 20 rows
    assert other("merge.fan_in=2") == one.key


def test_a_scores_key_names_model_rows_decoding_and_types() -> None:
    spec = EvaluateSpec(metric="exact_match")

    def score(**changes: object) -> str:
        fields = {"model_digest": BASE, "data": data(), "split": "test", "spec": spec, "dtype": "float32"}
        return evaluation_recipe(**{**fields, "weights_dtype": "float32", **changes}).key  # type: ignore[arg-type]

    changed = [
        score(model_digest="b" * 64), score(data=data(test="u")), score(split="validation"), score(dtype="bfloat16"),
        score(spec=EvaluateSpec(metric="rouge_l")), score(spec=EvaluateSpec(metric="exact_match", max_new_tokens=9)),
        score(weights_dtype="bfloat16"),
    ]  # fmt: skip
    assert len({score(), *changed}) == len(changed) + 1
    assert score(data=data("other training rows")) == score()


def test_every_kind_that_can_be_asked_for_is_told() -> None:
    assert set(EXPERT_KINDS) == set(get_args(PipelineConfig.model_fields["expert"].annotation))
    for name, kind in EXPERT_KINDS.items():
        config = load_config(CONFIG, [f"expert={name}"])
        assert kind_name(kind.spec(config, "rows")) == name
        assert kind.section in PipelineConfig.model_fields
