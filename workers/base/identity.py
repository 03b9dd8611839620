"""What a base is identified by: everything in its folder that changes what it computes.

Tensors (name, type, shape, bytes), tokenizer files (chat template included), the fields of its configuration and of its
generation settings. Not: container headers, sharding, and fields that are bookkeeping.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.digests import file_sha256
from infra.errors import BaseModelError
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles, hash_weights

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
KEPT_FILES = (CONFIG, GENERATION, *TOKENIZER_FILES)

_BOOKKEEPING = frozenset({
    "_commit_hash", "_from_model_config", "_model_name_or_path", "_name_or_path", "auto_map", "dtype", "torch_dtype",
    "transformers_version", "use_cache",
})  # fmt: skip
"""Of both files; the types are those of the tensors, and code of a checkpoint's own is never run."""
_SAMPLING = frozenset({"do_sample", "temperature", "top_k", "top_p"})
"""Of the generation settings: answers are greedy."""

_WITHOUT_SETTINGS: Mapping[str, str] = {
    "aaa180458c18b3b2ca20c61dda99c6078cb58b5e69844b3e22aaeba2a8dc1955": (
        "509b413de3d9694ad50e56f1eb30aef2bb3ab51f15d4bae1914581b611411dac"
    ),
}
"""Identities from before settings were part of them that stand for good, by the digest of the settings they stand for:
of bases that are pinned by a checksum (`workers.base.prepare.PYPI_MODELS`), so their keys are what they were."""


def base_identity(path: Path) -> str:
    """Hex SHA-256 of a prepared folder's contents. Reads every byte. BaseModelError for settings that are no JSON."""
    contents, settings = contents_identity(path), settings_digest(path)
    if _WITHOUT_SETTINGS.get(contents) == settings:
        return contents
    return hashlib.sha256(f"expert-factory base 2\n{contents}\n{settings}\n".encode()).hexdigest()


def is_identified(path: Path, sha256: str) -> bool:
    """Whether a prepared folder is the base `sha256`, also by its identity from before settings were part of it: models
    that were registered then refer to that. Reads every byte."""
    return sha256 in (contents_identity(path), base_identity(path))


def contents_identity(path: Path) -> str:
    """Hex SHA-256 of tensors and tokenizer files alone. Reads every byte."""
    digest = hashlib.sha256(b"expert-factory base 1\n")
    hash_weights(digest, CheckpointFiles.in_file(path / WEIGHTS))
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            digest.update(f"{name} {file_sha256(path / name)}\n".encode())
    return digest.hexdigest()


def settings_digest(path: Path) -> str:
    """Hex SHA-256 of what the configuration and the generation settings say, however they are written down."""
    config = {name: value for name, value in read_settings(path / CONFIG).items() if name not in _BOOKKEEPING}
    generation = {
        name: value
        for name, value in (read_settings(path / GENERATION) if (path / GENERATION).is_file() else {}).items()
        if name not in _BOOKKEEPING | _SAMPLING
    }
    return hashlib.sha256(json.dumps([config, generation], sort_keys=True).encode()).hexdigest()


def read_settings(file: Path) -> dict[str, Any]:
    """A configuration's fields as they are written. BaseModelError unless it is a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise BaseModelError(f"{file}: a JSON object is needed, found {type(found).__name__}; fetch it again")
    return found
