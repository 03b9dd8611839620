"""Rows of a hub's datasets: which split, which columns and fields of columns, labels by their names.

Loading and the types of columns are the library's (`datasets`); a dataset's own code is never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from infra.errors import DataError
from pipeline.data.sources import rows_of
from workers.text.rows import Row

_FIELDS = ("input", "target", "targets", "options", "id")


def hub_rows(
    name: str, columns: Mapping[str, str], where: Mapping[str, str] | None = None, split: str | None = None
) -> list[Row]:
    """Rows of a hub dataset `<owner>/<name>[/<config>]` or `<name>`: of `split`, else of `train`, else of the only one.

    `columns`: the column of each field, or a field of a column (`choices.text`; of a list, that of each element).
    Only rows whose columns equal the values of `where` are kept. A label is its name. Raises DataError.
    """
    source, dataset, conditions = f"source hub:{name}", _load(name, split), where or {}
    features = dict(dataset.features)
    wanted = [*columns.values(), *conditions]
    if absent := [path for path in wanted if path not in features and path not in set(_paths(features))]:
        raise DataError(f"{source}: no column {', '.join(absent)}; it has {', '.join(_paths(features))}")
    roots = {_root(features, path) for path in (*_FIELDS, *wanted)}

    def kept() -> Iterator[tuple[str, dict[str, Any]]]:
        for at, row in enumerate(dataset.select_columns([name for name in features if name in roots]), 1):
            if all(_meets(_dig(row, path), _feature(features, path), value) for path, value in conditions.items()):
                place = f"{source}, row {at}"
                yield place, {name: _named(features[name], value, place) for name, value in row.items()}

    rows = rows_of(kept(), source, columns, _dig)
    if not rows and conditions:
        asked = ", ".join(f"{path}={value}" for path, value in conditions.items())
        raise DataError(f"{source}: none of its {len(dataset)} rows has {asked} (where)")
    return rows


def _load(name: str, split: str | None) -> Any:
    """The dataset's split. Raises DataError."""
    from datasets import load_dataset

    parts = name.split("/")
    path, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        try:
            return load_dataset(path, config, split=split or "train")
        except ValueError as error:
            if split is not None or "Unknown split" not in str(error):
                raise
        found = load_dataset(path, config)
    except Exception as error:  # network, credentials, names and formats: the library raises many kinds
        said = " ".join(str(error).split())
        raise DataError(f"source hub:{name}: cannot be loaded ({type(error).__name__}: {said})") from error
    if len(found) != 1:
        raise DataError(f"source hub:{name}: it has no split train, but {', '.join(found)}; name one as split: …")
    return next(iter(found.values()))


def _root(features: Mapping[str, Any], path: str) -> str:
    """The column that `path` is, or lies in."""
    return path if path in features else path.partition(".")[0]


def _paths(features: Mapping[str, Any], before: str = "") -> list[str]:
    """Columns and, in place of a column that has some, its fields."""
    found = []
    for name, feature in features.items():
        inner = _element(feature)
        found += _paths(inner, f"{before}{name}.") if isinstance(inner, Mapping) else [before + name]
    return found


def _element(feature: Any) -> Any:
    """What a list is of, however deep; any other feature is itself."""
    while hasattr(feature, "feature") or isinstance(feature, list):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature


def _feature(features: Mapping[str, Any], path: str) -> Any:
    """The type at `path`, lists stepped through."""
    if path in features:
        return _element(features[path])
    head, _, rest = path.partition(".")
    return _feature(_element(features[head]), rest)


def _dig(value: Any, path: str) -> Any:
    """What is at `path`; of a list, what is there in each element; None if there is nothing."""
    if isinstance(value, list | tuple):
        return [_dig(item, path) for item in value]
    if not isinstance(value, Mapping):
        return None
    if path in value:  # a name with a dot in it, too
        return value[path]
    head, dot, rest = path.partition(".")
    return _dig(value.get(head), rest) if dot else None


def _named(feature: Any, value: Any, place: str) -> Any:
    """The value with the names of labels in place of their numbers."""
    if value is None:
        return None
    names = getattr(feature, "names", None)
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise DataError(f"{place}: label {value} is none of {', '.join(names)} (a split without labels?)")
        return names[value]
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: _named(feature[name], item, place) for name, item in value.items()}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_named(inner, item, place) for item in value]
    return value


def _meets(found: Any, feature: Any, value: str) -> bool:
    """Whether a condition's value is what was found: as text, or as the name of a label."""
    names = getattr(feature, "names", None)
    named = names is not None and isinstance(found, int) and 0 <= found < len(names) and names[found] == value
    return named or str(found) == value or (isinstance(found, bool) and str(found).lower() == value.lower())
