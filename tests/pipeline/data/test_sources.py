"""Data as files and hubs really have it: what is read as it is meant, and what is refused with its place."""

import bz2
import codecs
import contextlib
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import DataError
from pipeline.data.encoding import text_of
from pipeline.data.hub import hub_rows
from pipeline.data.sources import jsonl_rows

GOOD = [json.dumps({"input": f"question {at}", "target": f"answer {at}"}) for at in range(6)]


def rows_in(
    data: bytes, name: str = "s3://bucket/t.jsonl"
) -> list[tuple[str, tuple[str, ...], tuple[str, ...] | None]]:
    return [(row.input, row.targets, row.options) for row in jsonl_rows(name, lambda uri: data)]


def lines(*bad: str, before: int = 4) -> bytes:
    """Good lines, then these, then the other good ones."""
    return "\n".join([*GOOD[:before], *bad, *GOOD[before:]]).encode()


# -- bytes -------------------------------------------------------------------------------------------------------------

PLAIN = "\n".join(GOOD).encode()
ENCODED = {
    "UTF-8": PLAIN,
    "a byte order mark": codecs.BOM_UTF8 + PLAIN,
    "two files with marks, one after the other": codecs.BOM_UTF8 + PLAIN[:-1] + b"}\n" + codecs.BOM_UTF8,
    "lines of Windows": PLAIN.replace(b"\n", b"\r\n"),
    "lines of old Macs": PLAIN.replace(b"\n", b"\r"),
    "UTF-16, little-endian": PLAIN.decode().encode("utf-16"),
    "UTF-16, big-endian": codecs.BOM_UTF16_BE + PLAIN.decode().encode("utf-16-be"),
    "UTF-32": PLAIN.decode().encode("utf-32"),
    "gzip": gzip.compress(PLAIN),
    "gzip of UTF-16": gzip.compress(PLAIN.decode().encode("utf-16")),
    "two gzips, one after the other": gzip.compress(PLAIN[:20]) + gzip.compress(PLAIN[20:]),
    "bzip2": bz2.compress(PLAIN),
    "xz": lzma.compress(PLAIN),
    "blank lines": b"\n" + PLAIN.replace(b"\n", b"\n \n\n") + b"\n\n",
}


@pytest.mark.parametrize("case", ENCODED)
def test_files_are_read_however_they_were_saved(case: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(ENCODED[case])
    found = [(row.input, row.targets, row.options) for row in jsonl_rows(str(tmp_path / "t.jsonl"))]
    assert found == rows_in(PLAIN) == rows_in(ENCODED[case])


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")), st.booleans())
def test_any_text_survives_any_encoding(text: str, packed: bool) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        data = text.encode(encoding)
        assert text_of(gzip.compress(data) if packed else data, "f") == text


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"\x1f\x8b", b"\xff\xfe", b"PK\x03\x04", b"BZh", b"\xfd7zXZ\0"]))
def test_any_bytes_are_text_or_refused_in_a_line(data: bytes, sign: bytes) -> None:
    with contextlib.suppress(DataError):
        text_of(sign + data, "f")


# -- rows --------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[bytes, str]] = {
    "gzip that ends too early": (gzip.compress(PLAIN)[:-9], "gzip-compressed, but not to its end"),
    "a zip archive": (b"PK\x03\x04....", "a zip archive (as .xlsx files are)"),
    "a tar archive, packed": (gzip.compress(b"t.jsonl".ljust(257, b"\0") + b"ustar"), "a tar archive; unpack it"),
    "a 7z archive": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive; unpack it"),
    "an answer of an object store": (b"<?xml version='1.0'?><Error><Code>NoSuchKey", "an HTML or XML page, perhaps"),
    "Parquet": (b"PAR1....", "a Parquet file; write its rows as JSON lines, or name its folder as a hub: source"),
    "zstd": (b"\x28\xb5\x2f\xfd....", "compressed with zstd; decompress it, or use gzip"),
    "a page": (b"\n<!DOCTYPE HTML><html>", "an HTML or XML page, perhaps a server's answer in place of the file"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "Latin-1": (lines("für").decode().encode("latin-1"), "line 5: not UTF-8 at byte"),
    "UTF-16 without its mark": (PLAIN.decode().encode("utf-16-le"), "line 1: a zero byte, which texts do not have"),
    "NaN as answer": (lines('{"input": "a", "target": NaN}'), "line 5, target: NaN is no answer but a missing value"),
    "Infinity as answer": (lines('{"input": "a", "target": -Infinity}'), "line 5, target: -Infinity is no answer"),
    "NaN among answers": (lines('{"input": "a", "targets": ["b", NaN]}'), "line 5, target: NaN is no answer"),
    "NaN among options": (lines('{"input": "a", "target": "b", "options": ["b", NaN]}'), "line 5, options: NaN is no"),
    "NaN as input": (lines('{"input": NaN, "target": "b"}'), "line 5: field input is NaN; a text is needed"),
    "half a character in the input": (
        lines('{"input": "a \\ud83d", "target": "b"}'),
        "line 5, input: 'a \\ud83d' holds half",
    ),
    "half a character in the answer": (
        lines('{"input": "a", "target": "\\ude42 b"}'),
        "line 5, target: '\\ude42 b' holds half",
    ),
    "half a character in an option": (
        lines('{"input": "a", "target": "b", "options": ["b", "\\ud83d"]}'),
        "line 5, options: '\\ud83d' holds half a character",
    ),
    "a key twice": (
        lines('{"input": "a", "target": "b", "target": "c"}'),
        "line 5: not JSON (the key 'target' stands in it twice)",
    ),
    "after blank lines": (lines("", " ", '{"input": "a", "target": NaN}'), "line 7, target: NaN"),
    "a line that is cut": (lines('{"input": "a", "tar'), "line 5: not JSON"),
    "a list": (lines('["a", "b"]'), "line 5: list found; an object with input and target is accepted"),
    "a number": (lines("12"), "line 5: number found; an object with input"),
    "brackets without end": (lines("[" * 100_000), "line 5: nested too deeply"),
    "true as answer": (
        lines('{"input": "a", "target": true}'),
        "line 5, target: True found; a text or a list of texts",
    ),
    "an object as options": (
        lines('{"input": "a", "target": "b", "options": {"text": ["b"], "label": ["A"]}}'),
        "(its fields: text, label); a text or a list of texts is accepted",
    ),
    "no answers": (lines('{"input": "a", "targets": []}'), "line 5, target: [] found"),
    "an answer that is no option": (
        lines('{"input": "a", "target": 1.0, "options": ["0", "1"]}'),
        "line 5: target '1.0' is not among its options ['0', '1']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_row_is_refused_with_file_and_line(case: str) -> None:
    data, message = REFUSED[case]
    with pytest.raises(DataError) as caught:
        rows_in(data)
    assert str(caught.value).startswith("source jsonl:s3://bucket/t.jsonl")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # a terminal can show it


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file \(relative paths start at .*without what .gitignore names"):
        jsonl_rows("nowhere/t.jsonl")
    with pytest.raises(DataError, match="no such file"):
        jsonl_rows(str(tmp_path))


@pytest.mark.parametrize(
    "written", ["0", "1", "-0", "0.0", "1.0", "1.10", "1e3", "1E3", "1e-7", "1e999", "12345678901234567890", "9" * 5000]
)
def test_a_number_is_answered_as_it_is_written(written: str) -> None:
    line = f'{{"id": {written}, "input": "a", "target": {written}, "options": [{written}, 2]}}'
    assert rows_in(lines(line, before=0))[0] == ("a", (written,), (written, "2"))


def test_columns_that_nothing_asks_for_may_lack_values() -> None:
    """Tables that pandas wrote have NaN in them."""
    assert rows_in(b'{"input": "a", "target": "b", "score": NaN, "note": "\\ud83d"}') == [("a", ("b",), None)]


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that the library takes for datasets, read without a network."""
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import ClassLabel, Dataset, Features, List, Value

    root, label = tmp_path_factory.mktemp("hub"), ClassLabel(names=["neg", "pos"])

    def save(name: str, split: str, rows: list[dict[str, Any]], features: Any = None) -> None:
        (root / "data" / name).mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(str(root / "data" / name / f"{split}.parquet"))

    labelled = Features(
        {
            "text": Value("string"),
            "label": label,
            "many": List(label),
            "in": {"side": label},
            "listed": List({"of": label}),
        }
    )
    rows = [{"text": f"t{at}", "label": at % 2, "many": [0, 1], "in": {"side": 1}, "listed": [{"of": 1}, {"of": 0}]}
            for at in range(6)]  # fmt: skip
    save("labels", "train", rows, labelled)
    save("unlabelled", "train", [*rows, {**rows[0], "label": -1}], labelled)
    save("one", "validation", [{"input": "a", "target": "b"}])
    save("two", "validation", [{"input": "a", "target": "v"}])
    save("two", "test", [{"input": "a", "target": "t"}])
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    save("nested", "train", [{"question": "q", "choices": choices, "key": "A", "a.b": "dotted", "n": 1.0, "ok": True}])
    save("missing", "train", [{"input": "a", "target": 1.5}, {"input": "b", "target": float("nan")}])
    return root


def asked(monkeypatch: pytest.MonkeyPatch, hub: Path, name: str, *arguments: Any) -> list[tuple[str, ...]]:
    monkeypatch.chdir(hub)
    return [row.targets for row in hub_rows(f"data/{name}", *arguments)]


TEXT = {"input": "text"}


def test_labels_are_their_names_wherever_they_stand(monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    for column, first in {
        "label": ("neg",),
        "many": ("neg", "pos"),
        "in.side": ("pos",),
        "listed.of": ("pos", "neg"),
    }.items():
        assert asked(monkeypatch, hub, "labels", {**TEXT, "target": column})[0] == first
    named = asked(monkeypatch, hub, "labels", {**TEXT, "target": "label"}, {"label": "pos"})
    assert named == asked(monkeypatch, hub, "labels", {**TEXT, "target": "label"}, {"label": "1"}) == [("pos",)] * 3
    assert len(asked(monkeypatch, hub, "unlabelled", {**TEXT, "target": "label"}, {"label": "neg"})) == 3


def test_fields_of_columns_are_columns(monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    monkeypatch.chdir(hub)
    columns = {"input": "question", "target": "key", "options": "choices.label"}
    assert hub_rows("data/nested", columns)[0].options == ("A", "B")
    assert hub_rows("data/nested", {"input": "question", "targets": "choices.text"})[0].targets == ("red", "blue")
    assert hub_rows("data/nested", {"input": "question", "target": "a.b"})[0].targets == ("dotted",)
    assert hub_rows("data/nested", {"input": "question", "target": "n"}, {"ok": "true"})[0].targets == ("1.0",)


def test_a_split_is_the_one_named_or_the_only_one(monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    assert asked(monkeypatch, hub, "one", {}) == [("b",)]
    assert asked(monkeypatch, hub, "two", {}, None, "test") == [("t",)]
    assert sorted(asked(monkeypatch, hub, "two", {}, None, "test+validation")) == [("t",), ("v",)]


HUB_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "several splits": (("two", {}), "it has no split train, but validation, test; name one as split: …"),
    "another split": (("two", {}, None, "dev"), "Unknown split \"dev\". Should be one of ['validation', 'test']"),
    "no such column": (
        ("labels", {**TEXT, "target": "answer"}),
        "no column answer; it has text, label, many, in.side, listed.of",
    ),
    "no such field": (
        ("nested", {"input": "question", "target": "choices.answer"}),
        "no column choices.answer; it has question, choices.text",
    ),
    "a column of fields": (
        ("nested", {"input": "question", "target": "key", "options": "choices"}),
        "options: {'text': ['red', 'blue'], 'label': ['A', 'B']} found (its fields: text, label); a text or a list",
    ),
    "a row without a label": (
        ("unlabelled", {**TEXT, "target": "label"}),
        "row 7: label -1 is none of neg, pos (a split without",
    ),
    "a number that is missing": (("missing", {}), "row 2, target: nan is no answer but a missing value"),
    "no row that is asked for": (
        ("labels", {**TEXT, "target": "label"}, {"label": "positive"}),
        "none of its 6 rows has label=positive (where)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HUB_REFUSED)
def test_what_a_dataset_does_not_have_is_said(case: str, monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    arguments, message = HUB_REFUSED[case]
    with pytest.raises(DataError) as caught:
        asked(monkeypatch, hub, *arguments)
    assert str(caught.value).startswith(f"source hub:data/{arguments[0]}")
    assert message in str(caught.value)
