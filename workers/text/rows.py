"""Rows: the one shape that every task's data takes, and its bytes in the object store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from infra.errors import DataError
from infra.store.layout import rows_name


@dataclass(frozen=True)
class Row:
    """One example: `targets` are equally right answers, `options` the closed set to choose from (None: free text)."""

    id: str
    input: str
    targets: tuple[str, ...]
    options: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        options = None if self.options is None else list(self.options)
        return {"id": self.id, "input": self.input, "targets": list(self.targets), "options": options}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Row:
        options = value.get("options")
        return cls(
            id=str(value["id"]),
            input=str(value["input"]),
            targets=tuple(str(target) for target in value["targets"]),
            options=None if options is None else tuple(str(option) for option in options),
        )


def rows_to_jsonl(rows: Iterable[Row]) -> bytes:
    """Canonical JSON lines (sorted keys, UTF-8): equal rows give equal bytes."""
    lines = [json.dumps(row.to_dict(), sort_keys=True, ensure_ascii=False, separators=(",", ":")) for row in rows]
    return "".join(line + "\n" for line in lines).encode()


class ByteStore(Protocol):
    """What gives an object's bytes: `infra.store.s3.Store`, without depending on it."""

    def get(self, name: str) -> bytes: ...


def fingerprint(rows: Iterable[Row]) -> str:
    """Hex SHA-256 of the rows' canonical JSON lines."""
    return hashlib.sha256(rows_to_jsonl(rows)).hexdigest()


def load_rows(store: ByteStore, name: str) -> list[Row]:
    """Rows from the object store. DataError if they are not those that `name` was given for."""
    data = store.get(name)
    found = rows_name(hashlib.sha256(data).hexdigest())
    if found != name:
        raise DataError(
            f"stored rows {name} are corrupted: their fingerprint makes them {found}; delete the object "
            "(the next run writes it again) and check the disk behind the store"
        )
    return rows_from_jsonl(data)


def rows_from_jsonl(data: bytes) -> list[Row]:
    """Rows written by `rows_to_jsonl`. DataError naming the line that is not one."""
    rows = []
    for at, line in enumerate(data.decode().split("\n"), 1):
        if line:
            try:
                rows.append(Row.from_dict(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"stored rows, line {at}: not a row ({error})") from error
    return rows
