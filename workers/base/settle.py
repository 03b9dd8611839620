"""What is refused about a checkpoint, and put right, on its way into the cache, so that all who read it see one model.

Refused: quantised weights, settings that are no JSON. Put right, as transformers' loader does silently: constants that
earlier releases saved are left out; a body without its model's prefix gets it; a head that differs from the embedding,
though the configuration ties them, unties them there. Anything that cannot be known without a class of transformers is
left as it is: who loads the base as a model refuses it then (`workers.base.structure`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import BaseModelError
from workers.base.identity import CONFIG, GENERATION, read_settings
from workers.base.structure import empty_tensors, is_old_buffer, load_tensors, read_config, refuse_quantised
from workers.tensors.checkpoint import CheckpointFiles

_OTHER_NAMES = {"lm_head.weight": "embed_out.weight"}
"""Heads that transformers calls otherwise than the file does (GPT-NeoX)."""


def settle(folder: Path, files: CheckpointFiles, source: str) -> dict[str, str]:
    """The tensors that the checkpoint is to have in the cache: the name of each there, and its name in `files`;
    `folder` has the settings, which are rewritten where weights contradict them. BaseModelError, naming `source`, for
    what no model can be made of."""
    try:
        settings = read_settings(folder / CONFIG)
        if (folder / GENERATION).is_file():
            read_settings(folder / GENERATION)
    except BaseModelError as error:
        raise BaseModelError(str(error).replace(str(folder), f"base {source}")) from error
    refuse_quantised(source, settings)
    model = _named_class(folder, files)
    if model is None:
        return {name: name for name in files.names}
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    kept = [name for name in files.names if name in known or not is_old_buffer(name, files.piece(name).shape)]
    names = _with_prefix(kept, known, model.base_model_prefix)
    ties = settings.get("tie_word_embeddings", getattr(model.config, "tie_word_embeddings", False))
    if ties and _differ(model, files, names):
        (folder / CONFIG).write_text(json.dumps({**settings, "tie_word_embeddings": False}, indent=2) + "\n")
    return names


def _named_class(folder: Path, files: CheckpointFiles) -> Any:
    """The model that the configuration names, on the meta device; None if it names none that can be built."""
    import transformers

    try:
        config = read_config(folder)
        kind: Any = getattr(transformers, (config.architectures or ["none"])[0], None)
        if not hasattr(kind, "from_pretrained") or not hasattr(kind, "base_model_prefix"):
            return None
        return load_tensors(folder, kind, config, empty_tensors(files)).model
    except BaseModelError:
        return None


def _with_prefix(stored: list[str], known: set[str], prefix: str) -> dict[str, str]:
    """The tensors of a body under the names that they have inside the model, if none of them has such a name yet."""
    if not prefix or any(name.startswith(f"{prefix}.") for name in stored):
        return {name: name for name in stored}
    inside = {name: f"{prefix}.{name}" for name in stored}
    return {inside[n] if n not in known and inside[n] in known else n: n for n in stored}


def _differ(model: Any, files: CheckpointFiles, names: Mapping[str, str]) -> bool:
    """Whether weights that the configuration ties are both in the file, with different values."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        one, other = (names.get(name) or names.get(_OTHER_NAMES.get(name, "")) for name in (target, source))
        if one and other and not files.same(one, other):
            return True
    return False
