"""YAML as it is meant: what words are, what is refused with its place, and that what is written reads back the same."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from pipeline.config.document import overridden, read_yaml, write_yaml
from pipeline.config.model import PipelineConfig, dump_config, load_config

ODD = [
    "yes", "no", "on", "null", "~", "", "1e3", "1e-3", ".5", "010", "0o17", "12:30", "2024-01-31", "<<", "=", "${seed}",
    "${oc.env:HOME}", "???", "# no comment", "a: b", "- a", "'", '"', "\\", "\u2028", "\x85", "\ufeff", "\t x", " x ",
    "x\n", "\n\nx\n ", "|", ">", "%", "@", "`", "!!str", "&a", "*a", "{input}", "[", "\0", "🙂", "1_000", "0x1F",
    ".inf", "NaN", "TRUE", "---", "...", "? x", "a #b",
]  # fmt: skip
texts = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"]), max_size=24))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: yes", {"a": "yes"}),
        ("a: [true, False, null, ~, '']", {"a": [True, False, None, None, ""]}),
        ("a: 1e-3", {"a": 0.001}),
        ("a: [1, -2, 0x10, 0o17, 1., .5, 1.5e3, -.inf]", {"a": [1, -2, 16, 15, 1.0, 0.5, 1500.0, float("-inf")]}),
        ("a: 12:30", {"a": "12:30"}),
        ("a: 2024-01-31", {"a": "2024-01-31"}),
        ("a: 1_000", {"a": "1_000"}),
        ("a: Seed ${seed} of ${HOME}", {"a": "Seed ${seed} of ${HOME}"}),
        ('a: "\\ud83d\\ude42"', {"a": "🙂"}),
        ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}),
        ("# nothing", None),
    ],
)
def test_words_are_what_a_person_means(text: str, value: Any) -> None:
    assert read_yaml(text, "f") == value


REFUSED = {
    "the same key twice": ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands here and in line 1; keep one"),
    "the same key twice, further in": ("a:\n  - {b: 1, b: 1}", "line 2, column 12: the key 'b' stands here"),
    "the same key twice in another spelling": ('a: 1\n"a": 2', "line 2, column 1: the key 'a' stands here"),
    "octal or not": ("seed: 010", "line 1, column 7: 010 is 10 to some readers of YAML and octal to others"),
    "half a character": ('a: "\\ud83d"', "line 1, column 4: half a character"),
    "a text with a colon": ("t: Claim: {input}", "not allowed here (a text that holds ': ' needs quotes)"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document in the stream, but found another document"),
    "an unclosed list": ("a: [1", "line 1, column 6"),
    "a tag of Python": ("a: !!python/object:os.system x", "could not determine a constructor"),
    "a control character": ("a: \x01", "unacceptable character #x0001"),
    "a number beyond all bounds": ("a: " + "9" * 5000, "5000 digits"),
    "brackets without end": ("[" * 600, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_in_a_line_with_its_place(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: not readable as YAML: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_what_is_written_reads_back_the_same(value: Any) -> None:
    again = read_yaml(write_yaml(value), "f")
    assert again == value
    assert repr(again) == repr(value)  # 1 and 1.0 and true are equal


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(texts, texts, max_size=3), texts)
def test_an_override_replaces_one_value_and_nothing_else(document: dict[str, str], text: str) -> None:
    kept = {**document, "section": {"other": 1}}
    changed = overridden(kept, f"section.field={write_yaml(text)}".rstrip("\n").removesuffix("\n..."))
    assert changed == {**document, "section": {"other": 1, "field": text}}
    assert kept == {**document, "section": {"other": 1}}


OVERRIDES = {
    "no value": ("steps", "expected section.field=value"),
    "no name": ("=3", "expected section.field=value"),
    "an empty part": ("a..b=1", "expected section.field=value"),
    "an open bracket": ("a[=1", "expected section.field=value"),
    "an element that is not there": ("list[2]=1", "list is a list of 1, '2' is none of its elements (from 0)"),
    "a field of a number": ("number.x=1", "number is 1, which has no fields"),
    "a comment": ("text=Issue #5", None),
    "a comment after a blank": ("text=Issue 5 # or 6", "what follows ' #' is a comment to YAML"),
    "half a character": ("text=\udcff", "not UTF-8"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_an_override_that_names_nothing_is_refused(case: str) -> None:
    override, message = OVERRIDES[case]
    document = {"list": [0], "number": 1, "text": "a"}
    message = message or "what follows ' #' is a comment to YAML"
    with pytest.raises(ConfigError) as caught:
        overridden(document, override)
    assert message in str(caught.value)


def test_an_override_makes_sections_and_reaches_into_lists_and_names_with_dots() -> None:
    document = {"merge": {"candidates": [{"method": "mean"}]}, "export": None, "tasks": {"v1.5": {"metric": "f1"}}}
    for override in ("merge.candidates[0].method=ties", "export.dtype=float32", "tasks[v1.5].metric=accuracy"):
        document = overridden(document, override)
    assert document == {
        "merge": {"candidates": [{"method": "ties"}]},
        "export": {"dtype": "float32"},
        "tasks": {"v1.5": {"metric": "accuracy"}},
    }


# -- the whole model ---------------------------------------------------------------------------------------------------


def whole(least: int = 1, most: int = 10**6) -> st.SearchStrategy[int]:
    return st.integers(least, most)


def number(least: float, most: float, **bounds: bool) -> st.SearchStrategy[float]:
    return st.floats(least, most, allow_nan=False, **bounds)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values)


filled = texts.filter(lambda text: bool(text.strip()))
names = texts.filter(lambda text: text == text.strip() != "" and text.isprintable() and "?" not in text)
dtypes = st.sampled_from(["float32", "bfloat16"])
sizes = some(train=whole(), validation=whole(), gate=whole(8), test=whole())
around = st.tuples(texts, texts).filter(lambda parts: "{" not in "".join(parts) and "}" not in "".join(parts))
workers = some(
    cpus=st.one_of(st.just(0), number(0.01, 64)),
    gpus=st.one_of(number(0.001, 1), st.integers(0, 8)),
    memory_gib=number(0.001, 1e6),
)
tasks = st.fixed_dictionaries(
    {
        "source": st.sampled_from(["bigbench:a/b", "jsonl:data/t.jsonl", "jsonl:s3://b/o", "jsonl:${HOME}/x"]),
        "metric": st.sampled_from(["exact_match", "rouge_l", "choice_accuracy"]),
    },
    optional={
        "template": around.map(lambda parts: parts[0] + "{input}" + parts[1]),
        "max_new_tokens": optional(whole()),
        "distinct_by": st.sampled_from(["text", "words"]),
        "tolerate": some(dropped=optional(number(0, 1)), cut=optional(number(0, 1))),
        "sizes": sizes,
        "license": optional(filled),
    },
)
hub_tasks = st.fixed_dictionaries(
    {"source": st.just("hub:owner/name/config"), "metric": st.just("rouge_l")},
    optional={
        "split": optional(filled),
        "columns": st.dictionaries(st.sampled_from(["input", "target", "targets", "options"]), filled, max_size=4),
        "where": st.dictionaries(filled, texts, max_size=2),
    },
)
weights = st.one_of(st.just("training_rows"), st.dictionaries(texts, number(0, 1), max_size=2))
parameter = st.one_of(number(-2, 2), texts)
candidates = st.fixed_dictionaries(
    {"method": texts},
    optional={
        "params": st.dictionaries(texts, st.one_of(parameter, st.lists(parameter, min_size=1, max_size=2)), max_size=2),
        "weights": st.one_of(st.none(), weights, st.lists(weights, min_size=1, max_size=2)),
    },
)
others = tasks.map(lambda task: {**task, "source": "jsonl:kept.jsonl"})
kept = st.fixed_dictionaries(
    {"tasks": st.dictionaries(names.map("kept ".__add__), others, min_size=1, max_size=2)},
    optional={"weight": number(1e-6, 9), "rows_per_step": whole()},
)
configurations = st.fixed_dictionaries(
    {
        "suite": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True),
        "base": st.one_of(names.map("path:".__add__), st.just("pypi:SmolLM2-135M-Instruct"), st.just("hub:a/b@c")),
        "held_in": st.dictionaries(names.map("in ".__add__), st.one_of(tasks, hub_tasks), min_size=1, max_size=3),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "batch_size": whole(8), "micro_batch_size": optional(whole(1, 8)),
                "gradient_checkpointing": st.booleans(),
                "learning_rate": optional(number(1e-9, 10)), "weight_decay": number(0, 1), "clip_norm": number(1e-3, 9),
                "warmup_ratio": number(0, 0.9), "schedule": st.sampled_from(["linear", "cosine"]),
                "validate_every": whole(), "patience": st.none(), "checkpoint_every": optional(whole()),
                "compute_dtype": dtypes, "value_dtype": dtypes, "deterministic": st.booleans(),
            },
        ).flatmap(lambda rest: st.one_of(whole().map(lambda n: {**rest, "steps": n}),
                                         number(0.1, 9).map(lambda n: {**rest, "epochs": n}))),
        "merge": st.fixed_dictionaries(
            {"candidates": st.lists(candidates, min_size=1, max_size=3)},
            optional={
                "fan_in": st.sampled_from([2, 4, 8, 16]), "importance_rows": whole(),
                "search": some(evaluations=optional(whole())),
                "export": optional(some(dtype=dtypes, shard_gib=number(0.1, 99))),
            },
        ),
    },
    optional={
        "seed": whole(0, 2**64),
        "seeds": optional(st.lists(whole(0, 2**64), min_size=1, max_size=3, unique=True)),
        "expert": st.sampled_from(["sparse", "lora", "full"]),
        "prompt": some(wrapper=around.map(lambda parts: parts[0] + "{prompt}" + parts[1]), max_input_tokens=whole(),
                       max_target_tokens=whole()),
        "splits": sizes,
        "data": some(tolerate=some(dropped=number(0, 1), cut=number(0, 1))),
        "held_out": st.dictionaries(names.map("out ".__add__), tasks, max_size=2),
        "mask": some(modules=st.sampled_from(["attention", r".*\.(v|o)_proj"]), density=number(1e-6, 1),
                     granularity=st.sampled_from(["element", "block", "row", "column", "n_m"]), group=whole(2),
                     block_size=st.lists(whole(), min_size=2, max_size=2)),
        "rounds": st.one_of(
            st.just(1), some(count=st.just(1), support=st.sampled_from(["fresh", "kept"]), merge=candidates)
        ),
        "lora": some(rank=whole(), alpha=whole(), dropout=number(0, 0.9)),
        "refine": optional(some(merges=whole(), steps=st.lists(whole(), min_size=1, max_size=3, unique=True),
                                rows_per_task=st.just(1), learning_rate=number(1e-9, 10),
                                support=st.sampled_from(["fresh", "merge", "both"]), compute_dtype=dtypes,
                                seed=optional(whole(0)), teacher=st.sampled_from(["experts", None]),
                                teacher_weight=number(1e-6, 1), top_k=whole(),
                                keep=optional(kept))),
        "yardsticks": some(multitask=optional(some(steps=optional(whole()), learning_rate=number(1e-9, 10),
                                                   compute_dtype=dtypes, seed=optional(whole(0)))),
                           routed=optional(some(rows=whole())), few_shot_merge=st.just(False)),
        "evaluate": some(compute_dtype=dtypes, serving_dtype=optional(dtypes), batch_size=whole(),
                         few_shot=whole(0, 32)),
        "gate": some(rule=st.sampled_from(["superior", "not_worse"]), margin=number(0, 1), confidence=number(0.5, 0.99),
                     resamples=whole(1000), seed=whole(0)),
        "resources": some(expert=workers, evaluator=workers, node=workers, refine=optional(workers),
                          node_tasks=whole(), concurrent_nodes=whole(), concurrent_registrations=whole(),
                          retries=whole(0, 100), lease_seconds=number(3, 3600),
                          cluster_wait_seconds=optional(number(0, 86_400))),
    },
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(data=configurations)
def test_a_dumped_configuration_loads_to_the_same_one(tmp_path_factory: pytest.TempPathFactory, data: dict) -> None:
    config = PipelineConfig.model_validate(data)
    file = tmp_path_factory.mktemp("dumped") / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_the_property_covers_every_section_and_field() -> None:
    """A field that is added is added to the strategy too: none is left at its default only."""
    source = Path(__file__).read_text(encoding="utf-8")
    # fields that a value of depends on others, which test_model.py covers
    apart = {"objective", "registers", "labels", "length_normalised", "criterion", "keep", "budget", "score_batches",
             "reselect_every", "reselect_rounds", "shared", "mask", "resources"}  # fmt: skip

    def fields(model: Any) -> set[str]:
        found = set(model.model_fields)
        for field in model.model_fields.values():
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
                for one in (kind, *getattr(kind, "__args__", ())):
                    if hasattr(one, "model_fields"):
                        found |= fields(one)
        return found

    missing = {
        name for name in fields(PipelineConfig) - apart if f'"{name}"' not in source and f"{name}=" not in source
    }
    assert not missing
