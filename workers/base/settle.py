"""What is refused about a checkpoint, and put right, on its way into the cache, so that all who read it see one model.

Refused: quantised weights, settings that are no JSON. Put right, as transformers' loader does silently: constants that
earlier releases saved are left out; a body without its model's prefix gets it; a head that differs from the embedding,
though the configuration ties them, unties them there. Anything that cannot be known without a class of transformers is
left as it is: who loads the base as a model refuses it then (`workers.base.structure`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra.errors import BaseModelError
from workers.adapters.tensor_file import Entry, read_chunks
from workers.base.identity import CONFIG, GENERATION, read_settings
from workers.base.structure import empty_tensors, is_old_buffer, load_tensors, read_config, refuse_quantised

_OTHER_NAMES = {"lm_head.weight": "embed_out.weight"}
"""Heads that transformers calls otherwise than the file does (GPT-NeoX)."""


def settle(folder: Path, entries: Sequence[Entry], source: str) -> list[Entry]:
    """The tensors that the checkpoint is to have in the cache, under which names; `folder` has its settings, which are
    rewritten where weights contradict them. BaseModelError, naming `source`, for what no model can be made of."""
    try:
        settings = read_settings(folder / CONFIG)
        if (folder / GENERATION).is_file():
            read_settings(folder / GENERATION)
    except BaseModelError as error:
        raise BaseModelError(str(error).replace(str(folder), f"base {source}")) from error
    refuse_quantised(source, settings)
    model = _named_class(folder, entries)
    if model is None:
        return list(entries)
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    kept = [entry for entry in entries if entry.name in known or not is_old_buffer(entry.name, entry.shape)]
    kept = _with_prefix(kept, known, model.base_model_prefix)
    if settings.get("tie_word_embeddings", model.config.tie_word_embeddings) and _differ(model, kept):
        (folder / CONFIG).write_text(json.dumps({**settings, "tie_word_embeddings": False}, indent=2) + "\n")
    return kept


def _named_class(folder: Path, entries: Sequence[Entry]) -> Any:
    """The model that the configuration names, on the meta device; None if it names none that can be built."""
    import transformers

    try:
        config = read_config(folder)
        kind: Any = getattr(transformers, (config.architectures or ["none"])[0], None)
        if not hasattr(kind, "from_pretrained") or not hasattr(kind, "base_model_prefix"):
            return None
        return load_tensors(folder, kind, config, empty_tensors(entries)).model
    except BaseModelError:
        return None


def _with_prefix(entries: list[Entry], known: set[str], prefix: str) -> list[Entry]:
    """The tensors of a body under the names that it has inside the model, if none of them has such a name yet."""
    if not prefix or any(entry.name.startswith(f"{prefix}.") for entry in entries):
        return entries
    return [
        replace(entry, name=f"{prefix}.{entry.name}")
        if entry.name not in known and f"{prefix}.{entry.name}" in known
        else entry
        for entry in entries
    ]


def _differ(model: Any, entries: Sequence[Entry]) -> bool:
    """Whether weights that the configuration ties are both in the file, with different values."""
    here = {entry.name: entry for entry in entries}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        one, other = (here.get(name) or here.get(_OTHER_NAMES.get(name, "")) for name in (target, source))
        if one and other and (one.shape, one.dtype) == (other.shape, other.dtype):
            if any(a != b for a, b in zip(read_chunks(one), read_chunks(other), strict=True)):
                return True
        elif one and other:
            return True
    return False
