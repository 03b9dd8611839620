"""Where task data comes from: BIG-bench's archive, JSON lines, the hub. Raw rows become `Row`s; splits are
`pipeline.data.tasks`.

`bigbench:` reads the source archive of the PyPI package (checksummed, fetched once, never installed) and keeps only
the tasks that were asked for. `jsonl:` takes rows `input`, `target` or `targets`, optional `options`. `hub:` takes
the same columns, or others by a mapping (`pipeline.data.hub`). Texts are what the source says, letter by letter: a
number keeps its spelling, and what no text can be is refused with its place.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from infra.errors import DataError
from pipeline.data.encoding import has_lone_surrogate, text_of
from pipeline.data.json_lines import Numeral, json_objects
from workers.base.downloads import fetch_pypi
from workers.text.rows import Row

BIGBENCH = (
    "bigbench==1.0.0",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    "bigbench-1.0.0.tar.gz",
)
_TASKS = "/bigbench/benchmark_tasks/"
_INDEX = "index.json"
_COLUMNS = ("input", "target", "targets", "options")
NOT_STATED = "not stated"
"""Licence of data that says nothing of one."""
ReadBytes = Callable[[str], bytes]
Pick = Callable[[Mapping[str, Any], str], Any]


def extract_bigbench(names: Iterable[str], cache: Path, archive: Path | None = None) -> dict[str, Path]:
    """Path of each task's JSON in the cache; one pass over the archive for all that are missing.

    `archive` replaces the download. DataError for a name that the archive does not have, with the nearest ones.
    """
    wanted = sorted(set(names))
    folder = Path(cache) / "bigbench"
    paths = {name: folder / (name.replace("/", "__") + ".json") for name in wanted}
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / _INDEX
    with FileLock(str(folder) + ".lock"):
        if index.is_file():
            _check_known(wanted, json.loads(index.read_text(encoding="utf-8")))
        missing = {name for name in wanted if not paths[name].is_file()}
        if missing:
            source = archive or fetch_pypi(*BIGBENCH, Path(cache) / "downloads")
            known = _extract(source, missing, paths)
            _write_atomic(index, json.dumps(known).encode())
            _check_known(wanted, known)
    return paths


def _extract(archive: Path, missing: set[str], paths: Mapping[str, Path]) -> list[str]:
    known = []
    try:
        with tarfile.open(archive, mode="r|gz") as stream:
            for member in stream:
                if _TASKS not in member.name or not member.name.endswith("/task.json") or not member.isfile():
                    continue
                name = member.name.split(_TASKS, 1)[1].removesuffix("/task.json")
                known.append(name)
                if name in missing:
                    content = stream.extractfile(member)
                    assert content is not None
                    _write_atomic(paths[name], content.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: not a sound BIG-bench archive ({error}); remove it and run again") from error
    return sorted(known)


def _write_atomic(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    os.replace(temporary, path)


def _check_known(wanted: Sequence[str], known: Sequence[str]) -> None:
    for name in wanted:
        if name not in known:
            short = {task.rsplit("/", 1)[-1]: task for task in known}
            near = [short[at] for at in difflib.get_close_matches(name.rsplit("/", 1)[-1], short, n=2, cutoff=0.5)]
            near += [task for task in difflib.get_close_matches(name, known, n=2, cutoff=0.5) if task not in near]
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise DataError(
                f"source bigbench:{name}: the archive has no such task{hint} (a path below benchmark_tasks)"
            )


def bigbench_rows(path: Path, source: str, choice: bool) -> list[Row]:
    """Rows of a BIG-bench JSON task. With `target_scores`, the options and their best-scored ones are the answer,
    unless the task also has free-text targets and `choice` is false."""
    try:
        text = path.read_text(encoding="utf-8")
        examples = json.loads(text, parse_float=Numeral, parse_int=Numeral)["examples"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source}: its task.json has no readable examples ({error})") from error
    rows = []
    for at, example in enumerate(examples):
        try:
            rows.append(Row(str(at), *_bigbench_row(example, choice)))
        except DataError as error:
            raise DataError(f"{source}, example {at}, {error}") from error
    return rows


def _bigbench_row(example: Mapping[str, Any], choice: bool) -> tuple[str, tuple[str, ...], tuple[str, ...] | None]:
    """Input, targets and options of an example. Raises DataError, beginning with the field."""
    scores, target = example.get("target_scores"), example.get("target")
    options: tuple[str, ...] | None = None
    if scores and (choice or target is None):
        options = texts_of(list(scores), "field target_scores")
        values = [float(score.text) if isinstance(score, Numeral) else score for score in scores.values()]
        best = max(values)
        targets = tuple([option for option, score in zip(options, values, strict=True) if score == best])
    else:
        targets = texts_of(target, "field target")
    return _text(str(example["input"]), "field input"), targets, options


def texts_of(value: Any, where: str) -> tuple[str, ...]:
    """A text or number, or a list of them, as texts. Raises DataError, beginning with `where`, for anything else, also
    for what is no number (NaN) and no whole character (half of a surrogate pair)."""
    if isinstance(value, str):
        return (_text(value, where),)
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(
        not isinstance(item, str | int | float | Numeral) or isinstance(item, bool) for item in values
    ):
        fields = f" (its fields: {', '.join(map(str, value))})" if isinstance(value, Mapping) else ""
        raise DataError(f"{where}: {value!r} found{fields}; a text or a list of texts is accepted")
    return tuple(_text(item, where) for item in values)


def _text(value: str | int | float | Numeral, where: str) -> str:
    if isinstance(value, Numeral):
        if not value.finite:
            raise DataError(f"{where}: {value.text} is no answer but a missing value; give it a text or drop the row")
        return value.text
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: {value} is no answer but a missing value; give it a text or drop the row")
    text = str(value)
    if has_lone_surrogate(text):
        raise DataError(f"{where}: {text[:60]!a} holds half a character (a lone surrogate); write the whole or drop it")
    return text


def jsonl_rows(location: str, read_bytes: ReadBytes | None = None) -> list[Row]:
    """Rows of a JSON-lines file, a local path or an s3:// URI (read through `read_bytes`, default: the object
    store); encodings and compression as in `text_of`."""
    source = f"jsonl:{location}"
    if location.startswith("s3://"):
        data = (read_bytes or _read_s3)(location)
    else:
        path = Path(location).expanduser()
        if not path.is_file():
            raise DataError(
                f"source {source}: no such file (relative paths start at {Path.cwd()}; a submitted job has the "
                "checkout's copy, without what .gitignore names)"
            )
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"source {source}: cannot be read ({error.strerror})") from error
    return rows_of(json_objects(text_of(data, f"source {source}"), f"source {source}"), f"source {source}", {})


def _read_s3(uri: str) -> bytes:
    from infra.store.s3 import Store, split_uri

    bucket, name = split_uri(uri)
    endpoint = os.environ.get("FACTORY_S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL_S3")
    return Store(bucket, endpoint).get(name)


def source_license(source: str) -> str:
    """Licence of a source's data, as far as the source states it: BIG-bench's own, or that of the hub's dataset card.

    Never fails: a card that cannot be read states nothing.
    """
    kind, _, name = source.partition(":")
    if kind == "bigbench":
        return "Apache-2.0"
    return _card_license("/".join(name.split("/")[:2])) if kind == "hub" else NOT_STATED


@functools.cache  # many tasks are parts of one dataset
def _card_license(dataset: str) -> str:
    """The licence in the front matter of a dataset's README.md, on the hub or in a local folder."""
    from huggingface_hub import DatasetCard

    local = Path(dataset) / "README.md"
    try:
        found = DatasetCard.load(str(local) if local.is_file() else dataset).data.to_dict().get("license")
    except Exception:  # network, credentials, front matter: the library raises many kinds
        return NOT_STATED
    if isinstance(found, list):
        return ", ".join(map(str, found)) or NOT_STATED
    return str(found) if found else NOT_STATED


def rows_of(
    found: Iterable[tuple[str, Mapping[str, Any]]], source: str, columns: Mapping[str, str], pick: Pick = Mapping.get
) -> list[Row]:
    """Rows of objects, each with where it stands. `columns`: the object's name for a field, where it is another;
    `pick` takes a field of an object by that name. Raises DataError naming the place."""
    unknown = sorted(set(columns) - set(_COLUMNS))
    if unknown:
        raise DataError(f"{source}: columns {', '.join(unknown)} unknown; accepted: {', '.join(_COLUMNS)}")
    rows = []
    for at, (where, value) in enumerate(found):
        fields = {field: pick(value, columns.get(field, field)) for field in _COLUMNS}
        if not isinstance(fields["input"], str) or not fields["input"].strip():
            raise DataError(
                f"{where}: field input is {fields['input']!r}; a text is needed (columns: {', '.join(value)})"
            )
        target = fields["targets"] if fields["targets"] is not None else fields["target"]
        if target is None:
            raise DataError(f"{where}: neither target nor targets; columns found: {', '.join(value)}")
        targets = texts_of(target, f"{where}, target")
        options = None if fields["options"] is None else texts_of(fields["options"], f"{where}, options")
        if options is not None and (blank := [option for option in options if not option.strip()]):
            raise DataError(f"{where}: option {blank[0]!r} is empty")
        if options is not None and not set(targets) & set(options):
            raise DataError(f"{where}: target {targets[0]!r} is not among its options {list(options)}")
        text = _text(fields["input"], f"{where}, input")
        rows.append(Row(str(value.get("id", at)), text, targets, options))
    return rows
