"""Sources and splits: synthetic JSON lines and a synthetic BIG-bench archive; nothing is downloaded."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import DataError
from infra.store.layout import rows_name
from pipeline.data.distinct import is_blank, normalised
from pipeline.data.sources import source_license
from pipeline.data.tasks import TaskConfig, TaskData, learned_elsewhere, load_tasks, make_splits
from workers.text.rows import Row, fingerprint, load_rows, rows_from_jsonl, rows_to_jsonl

SIZES = {"train": 16, "validation": 4, "gate": 5, "test": 6}
texts = st.lists(
    st.text(min_size=1, max_size=12).filter(lambda t: not is_blank(normalised(t))), min_size=23, max_size=60
)


def splits_of(rows: list[Row], sizes: dict[str, int], seed: int, **how: Any) -> dict[str, tuple[Row, ...]]:
    return make_splits(rows, sizes, seed, **how)[0]


def rows_of(inputs: list[str]) -> list[Row]:
    return [Row(str(at), text, (f"answer {text}",)) for at, text in enumerate(inputs)]


def inputs_of(split: tuple[Row, ...]) -> set[str]:
    return {normalised(row.input) for row in split}


@settings(max_examples=60, deadline=None)
@given(texts, st.randoms(use_true_random=False), st.integers(0, 5))
def test_splits_are_disjoint_and_independent_of_order(inputs: list[str], random, seed: int) -> None:
    rows = rows_of(inputs)
    if len(set(inputs)) < 23:
        with pytest.raises(DataError, match="distinct rows"):
            splits_of(rows, SIZES, seed)
        return
    splits = splits_of(rows, SIZES, seed)
    ids = [row.id for split in splits.values() for row in split]
    assert len(ids) == len(set(ids))
    assert [len(splits[name]) for name in ("test", "gate", "validation")] == [6, 5, 4]
    seen = [row.input for split in splits.values() for row in split]
    assert len(seen) == len(set(seen)) == sum(map(len, splits.values()))
    shuffled = list(rows)
    random.shuffle(shuffled)
    again = splits_of(shuffled, SIZES, seed)
    assert {name: fingerprint(split) for name, split in splits.items()} == {
        name: fingerprint(split) for name, split in again.items()
    }


def plain_splits(rows: list[Row], sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """The splits by definition: every group ranked by its hash, every row of a group by its own."""

    def digest(*parts: str) -> str:
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()

    groups: dict[str, list[Row]] = {}
    for row in rows:
        if normalised(row.input) and any(target.strip() for target in row.targets):
            groups.setdefault(normalised(row.input), []).append(row)
    order, splits = sorted(groups, key=lambda key: digest(str(seed), key)), {}
    for name in ("test", "gate", "validation", "train"):
        splits[name] = []
        for key in order[: sizes[name]]:
            group = sorted(groups[key], key=lambda row: digest(row.input, *row.targets, "", *(row.options or ())))
            targets = group[0].targets
            if all(row.options is None for row in group):
                targets = tuple(dict.fromkeys(target for row in group for target in row.targets if target.strip()))
            splits[name].append(Row(digest(key)[:16], group[0].input, targets, group[0].options))
        order = order[sizes[name] :]
    return splits


words = st.sampled_from(["a", "A ", "b", " ", "c\n", "é", "ß", "SS", "d"])
rows_with_duplicates = st.lists(
    st.builds(
        Row,
        st.text(max_size=2),
        st.lists(words, min_size=1, max_size=4).map("".join),
        st.lists(words, min_size=1, max_size=3).map(tuple),
        st.none(),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(rows_with_duplicates, st.integers(0, 3))
def test_splits_are_those_of_their_definition(rows: list[Row], seed: int) -> None:
    sizes = {"train": 3, "validation": 1, "gate": 1, "test": 2}
    expected = plain_splits(rows, sizes, seed)
    if sum(map(len, expected.values())) < sum(sizes.values()):
        with pytest.raises(DataError, match="distinct rows"):
            splits_of(rows, sizes, seed, by="words")
        return
    found = splits_of(rows, sizes, seed, by="words")
    assert {name: list(split) for name, split in found.items()} == expected
    assert {name: fingerprint(split) for name, split in found.items()} == {
        name: fingerprint(split) for name, split in expected.items()
    }


def test_adding_rows_moves_few_and_seed_moves_many() -> None:
    inputs = [f"question {at}" for at in range(1000)]
    sizes = {"train": 512, "validation": 24, "gate": 24, "test": 48}
    before = splits_of(rows_of(inputs), sizes, 0)
    after = splits_of(rows_of([*inputs, *(f"new {at}" for at in range(20))]), sizes, 0)
    assert len(inputs_of(before["test"]) & inputs_of(after["test"])) >= 45
    assert not inputs_of(before["train"]) & (inputs_of(after["test"]) | inputs_of(after["gate"]))
    assert not inputs_of(before["validation"]) & (inputs_of(after["test"]) | inputs_of(after["gate"]))
    other = splits_of(rows_of(inputs), sizes, 1)
    assert len(inputs_of(before["test"]) & inputs_of(other["test"])) < 15


def test_duplicates_become_one_row_with_all_references() -> None:
    rows = [*rows_of([f"q {at}" for at in range(23)]), Row("x", "Q  3 ", ("another",))]
    splits = splits_of(rows, SIZES, 0, by="words")
    row = next(row for split in splits.values() for row in split if normalised(row.input) == "q 3")
    assert set(row.targets) == {"answer q 3", "another"}


def test_rows_round_trip_with_line_separators_inside() -> None:
    rows = [Row("1", "a\u2028b\nc", ("x",), ("x", "y")), Row("2", "é", ("1", "2"))]
    assert rows_from_jsonl(rows_to_jsonl(rows)) == rows


def test_stored_rows_that_changed_are_refused(tmp_path: Path) -> None:
    class Folder:
        def get(self, name: str) -> bytes:
            return (tmp_path / name.replace("/", "-")).read_bytes()

    rows = [Row("1", "a", ("x",)), Row("2", "b", ("y",))]
    name = rows_name(fingerprint(rows))
    file = tmp_path / name.replace("/", "-")
    file.write_bytes(rows_to_jsonl(rows))
    assert load_rows(Folder(), name) == rows
    file.write_bytes(rows_to_jsonl(rows[:1]))
    with pytest.raises(DataError, match="corrupted"):
        load_rows(Folder(), name)


def bigbench_archive(path: Path) -> Path:
    tasks = {
        "colours": [{"input": f"c{at}", "target_scores": {"red": at % 2, "blue": 1 - at % 2}} for at in range(30)],
        "group/past_tense_json": [{"input": f"v{at}", "target": f"v{at}ed"} for at in range(30)],
        "both": [{"input": f"b{at}", "target": ["Yes. So."], "target_scores": {"Yes": 1, "No": 0}} for at in range(30)],
        "unused": [{"input": "u", "target": "u"}],
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, examples in tasks.items():
            data = json.dumps({"examples": examples}).encode()
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_bigbench_tasks_from_one_archive_then_from_the_cache(tmp_path: Path) -> None:
    archive = bigbench_archive(tmp_path / "b.tar.gz")
    tasks = {
        "colours": TaskConfig(source="bigbench:colours", metric="choice_accuracy"),
        "past": TaskConfig(source="bigbench:group/past_tense_json", metric="exact_match", template="Past?\n{input}"),
        "yes_no": TaskConfig(source="bigbench:both", metric="choice_accuracy"),
        "why": TaskConfig(source="bigbench:both", metric="rouge_l"),
    }
    loaded = load_tasks(tasks, tmp_path, SIZES, archive=archive)
    archive.unlink()
    assert load_tasks(tasks, tmp_path, SIZES, archive=archive) == loaded
    row = loaded["colours"].splits["test"][0]
    assert row.options == ("red", "blue")
    assert row.targets == (("red",) if int(row.input[1:]) % 2 else ("blue",))
    assert loaded["past"].splits["train"][0].options is None
    assert loaded["yes_no"].splits["test"][0].targets == ("Yes",)
    assert loaded["why"].splits["test"][0].targets == ("Yes. So.",)
    assert not (tmp_path / "bigbench" / "unused.json").exists()
    with pytest.raises(DataError, match=r"wrong:.*past_tense.*did you mean group/past_tense_json") as caught:
        load_tasks({"wrong": TaskConfig(source="bigbench:past_tense", metric="rouge_l")}, tmp_path, SIZES)
    assert "\n" not in str(caught.value)


def write_jsonl(path: Path, rows: list[dict]) -> TaskConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskConfig(source=f"jsonl:{path}", metric="exact_match")


def test_jsonl_file_and_object(tmp_path: Path) -> None:
    rows = [{"input": f"i{at}", "target": at} for at in range(40)]
    local = load_tasks({"t": write_jsonl(tmp_path / "t.jsonl", rows)}, tmp_path, SIZES)["t"]
    data = (tmp_path / "t.jsonl").read_bytes()
    remote = TaskConfig(source="jsonl:s3://bucket/t.jsonl", metric="exact_match")
    fetched = load_tasks({"t": remote}, tmp_path, SIZES, read_bytes=lambda uri: data)["t"]
    assert fetched.fingerprints == local.fingerprints
    assert len(local.splits["train"]) == 16


def test_a_licence_is_the_one_given_or_the_sources_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_jsonl(tmp_path / "t.jsonl", [{"input": f"i{at}", "target": at} for at in range(40)])
    assert load_tasks({"t": config}, tmp_path, SIZES)["t"].license == "not stated"
    given = load_tasks({"t": config.model_copy(update={"license": "mit"})}, tmp_path, SIZES)["t"]
    assert given.license == "mit"
    assert source_license("bigbench:group/task") == "Apache-2.0"
    monkeypatch.chdir(tmp_path)  # the hub's libraries take a folder for a dataset of that name
    for name, front in {"plain": "license: cc-by-4.0", "two": "license:\n- mit\n- cc0-1.0", "none": "x: y"}.items():
        (tmp_path / "owner" / name).mkdir(parents=True)
        (tmp_path / "owner" / name / "README.md").write_text(f"---\n{front}\n---\n# A card\n")
    assert source_license("hub:owner/plain/config") == "cc-by-4.0"
    assert source_license("hub:owner/two") == "mit, cc0-1.0"
    assert source_license("hub:owner/none") == "not stated"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"text": "a"}], "line 1: field input"),
        ([{"input": "a"}], "neither target nor targets"),
        ([{"input": "a", "target": {"x": 1}}], "a text or a list"),
        ([{"input": "a", "target": "x", "options": ["y"]}], "not among its options"),
        ([{"input": "a", "target": "x"}], "distinct rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(DataError, match=rf"task mine.*{message}"):
        load_tasks({"mine": write_jsonl(tmp_path / "t.jsonl", rows)}, tmp_path, SIZES)


def test_choice_needs_options_and_files_must_exist(tmp_path: Path) -> None:
    config = write_jsonl(tmp_path / "t.jsonl", [{"input": f"i{at}", "target": "x"} for at in range(40)])
    with pytest.raises(DataError, match="have no options"):
        load_tasks({"t": config.model_copy(update={"metric": "choice_accuracy"})}, tmp_path, SIZES)
    with pytest.raises(DataError, match="no such file"):
        load_tasks({"t": TaskConfig(source="jsonl:/nowhere.jsonl", metric="rouge_l")}, tmp_path, SIZES)


@pytest.mark.parametrize(
    "change",
    [{"source": "ftp:x"}, {"template": "no input"}, {"metric": "bleu"}, {"metrik": "x"}, {"columns": {"input": "q"}}],
)
def test_bad_configuration_is_refused(change: dict) -> None:
    with pytest.raises(ValidationError):
        TaskConfig(**{"source": "jsonl:x", "metric": "rouge_l", **change})


def test_labels_are_those_given_or_those_that_occur(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"input": f"text {i}", "target": "ba"[i % 2]}) + "\n" for i in range(40)))

    def labels(rows: Path = file, **changes: object) -> tuple[str, ...]:
        config = TaskConfig(source=f"jsonl:{rows}", metric="matthews", **changes)
        return load_tasks({"mine": config}, tmp_path, SIZES)["mine"].labels

    assert labels() == ("a", "b")
    assert labels(labels=["b", "c", "a"]) == ("b", "c", "a")
    with pytest.raises(DataError, match="task mine: target 'b' is none of labels"):
        labels(labels=["a", "c"])
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps({"input": f"text {i}", "target": "a"}) + "\n" for i in range(40)))
    with pytest.raises(DataError, match="one target only"):
        labels(same)


def test_test_rows_that_another_expert_has_learned_are_counted() -> None:
    """Two tasks over one source, of other sizes: what is test data of one is training data of the other."""

    def data(name: str, train: str, test: str, answer: str = "y") -> TaskData:
        def rows(ids: str) -> tuple[Row, ...]:
            return tuple(Row(each, each, (answer,)) for each in ids)

        return TaskData(
            name,
            TaskConfig(source="jsonl:x", metric="exact_match"),
            {"train": rows(train), "validation": rows("v"), "gate": (), "test": rows(test)},
        )

    tasks = {
        "one": data("one", "ab", "cd"),
        "two": data("two", "cx", "ae"),
        "other answers": data("other answers", "q", "ab", "n"),
        "held out": data("held out", "cd", "xvz"),
    }
    found = learned_elsewhere(tasks, ["one", "two", "other answers"])
    assert found == {"one": 1, "two": 1, "held out": 2}
    assert learned_elsewhere(tasks, ["other answers"]) == {}


def test_a_choice_without_a_wrong_option_is_refused(tmp_path: Path) -> None:
    rows = [{"input": f"i{at}", "targets": ["x", "y"], "options": ["x", "y"][: 1 + at % 2]} for at in range(40)]
    config = write_jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match="every option of its rows is right"):
        load_tasks({"t": config.model_copy(update={"metric": "choice_accuracy"})}, tmp_path, SIZES)
