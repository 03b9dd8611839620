"""What a merge by hand is asked for: a YAML file, flags, or both."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from infra.errors import ConfigError
from merge.by_hand.defaults import DEFAULT_SHARD_GIB
from merge.by_hand.sources import name_experts


class MergeRequest(BaseModel):
    """A merge by hand, as a YAML file (`--config`) or from flags; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    base: str
    """`pypi:NAME`, `path:FOLDER` or `hub:REPOSITORY[@REVISION]`."""
    method: str
    """Name of a method (`python -m merge methods`)."""
    params: dict[str, float | str] = {}
    """The method's parameters; what is not given has its default."""
    experts: Annotated[dict[str, str], Field(min_length=1)]
    """Sources by name, or a list of sources, which are named after their files."""
    weights: dict[str, float] = {}
    """Weight of each expert, for methods that take weights."""
    fisher: dict[str, str] = {}
    """File of each expert's Fisher diagonal."""
    gram: dict[str, str] = {}
    """File of each expert's Gram matrices."""
    out: str | None = None
    """The merged adapter: a file, or `s3://bucket/name`."""
    checkpoint: str | None = None
    """A full checkpoint: a folder, or `s3://bucket/prefix`."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of the checkpoint's floating-point tensors; null: the base's own."""
    shard_gib: Annotated[float, Field(gt=0)] = DEFAULT_SHARD_GIB
    """Largest size of one of the checkpoint's files, in GiB."""
    store: bool = False
    """Keep every node of the reduction in the object store, so that a later merge recomputes only what changed."""
    register_as: str | None = None
    """Register the merged adapter in MLflow under this name; `out` must be in S3."""

    @property
    def measurements(self) -> dict[str, dict[str, str]]:
        """The given files of each option that gives files of a measurement, by expert."""
        return {"fisher": self.fisher, "gram": self.gram}

    @field_validator("experts", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return name_experts(given) if isinstance(given, list) else given


def shard_bytes(gib: float) -> int:
    """Bytes of so many GiB. Raises ConfigError for what is no size of a file."""
    if not (math.isfinite(gib) and gib * 2**30 >= 1):
        raise ConfigError(f"--shard-gib {gib}: accepted is a number of GiB, from one byte on")
    return int(gib * 2**30)


def read_request(path: Path | None, flags: Mapping[str, Any]) -> MergeRequest:
    """The request of a YAML file with flags on top. A flag's table (experts, params …) replaces entries of its names;
    another method than the file's drops the file's parameters.

    Raises:
        ConfigError: naming every unknown, missing or mistyped field.
    """
    fields = _read_yaml(path) if path else {}
    if isinstance(fields.get("experts"), list):
        fields["experts"] = name_experts(fields["experts"])
    if "method" in flags and flags["method"] != fields.get("method"):
        fields.pop("params", None)
    for name, value in flags.items():
        old = fields.get(name)
        fields[name] = {**old, **value} if isinstance(value, dict) and isinstance(old, dict) else value
    try:
        return MergeRequest.model_validate(fields)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        where = f"{path}: " if path else ""
        raise ConfigError(where + "; ".join(lines)) from None


class _Once(yaml.SafeLoader):
    """Refuses a mapping that holds one key twice: YAML takes the last one, and an expert would be left out."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = str(self.construct_object(key)), key.start_mark.line + 1  # 1 and "1" name one expert
            if name in lines:
                raise ConfigError(
                    f"{key.value!r} stands twice in one mapping, in lines {lines[name]} and {line}; name each once"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(found).__name__}")
    return found


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    fields = list(MergeRequest.model_fields)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, fields, n=1)
        return f"{place}: unknown field; " + (
            f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(fields)}"
        )
    if item["type"] == "missing":
        return f"{place}: missing; give --{place.removesuffix('s') if place == 'experts' else place}"
    return f"{place}: {item['msg']} (found {str(item['input'])[:60]!r})"
