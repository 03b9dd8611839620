"""What lies beside an expert's weights: its tokenizer, chat template and settings, compared with the base's.

A merge and a conversion keep the base's. Where the expert's embeddings mean other tokens that is an error; whatever
else of the expert's stays behind is told. Nothing is executed, and a folder without such files is fine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from infra.errors import BaseModelError
from workers.tensors.quantised import settings_of

Read = Callable[[str], bytes | None]
"""Content of the file of that name, None where there is none."""

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
COMPANIONS = (
    CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "merges.txt", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip
_SPLITTING = ("normalizer", "pre_tokenizer", "post_processor")
_SPECIAL = ("bos_token", "eos_token", "pad_token")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BOOKKEEPING = frozenset({
    "_attn_implementation", "_commit_hash", "_from_model_config", "_model_name_or_path", "_name_or_path",
    "architectures", "auto_map", "compression_config", "dtype", "id2label", "label2id", "quantization_config",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
    "vocab_size",
})  # fmt: skip
"""Settings that say nothing of what the weights compute, or that are compared elsewhere (shapes, tied tensors)."""


def in_folder(folder: Path) -> Read:
    """Reads the files of a folder."""

    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    return read


def compare_companions(what: str, theirs: Read, ours: Read) -> tuple[str, ...]:
    """What of the expert's tokenizer, chat template and settings stays behind, one line each, `what` named first.

    Raises BaseModelError where its tokenizer gives tokens other ids than the base's.
    """
    found = [*_tokenizer(what, theirs, ours)]
    template = _template(theirs)
    if template is not None and template != _template(ours):
        found.append("it has another chat template, which is ignored")
    if changed := _changed(_special(theirs), _special(ours), missing=False):
        found.append(f"its tokenizer's special tokens are ignored ({TOKENIZER_CONFIG}: {changed})")
    base = _settings(ours(CONFIG))
    ids = {name: base[name] for name in _TOKENS if name in base}  # what a generation without settings of its own uses
    if changed := _changed(_settings(theirs(GENERATION)), ids | _settings(ours(GENERATION)), missing=True):
        found.append(f"its generation settings are ignored ({GENERATION}: {changed})")
    if changed := _changed(_settings(theirs(CONFIG)), base, missing=False):
        found.append(f"its model settings are ignored ({CONFIG}: {changed})")
    return tuple(f"{what}: {line}; the base's are kept" for line in found)


def leftovers(what: str, names: Collection[str], used: Collection[str]) -> tuple[str, ...]:
    """What to say of safetensors files in a checkpoint's folder (`names`) that are none of its own (`used`)."""
    others = sorted(name for name in names if name.endswith(".safetensors") and name not in used)
    if not others:
        return ()
    shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    return (f"{what}: {shown} beside its weights ({', '.join(sorted(used)[:3])}) are ignored",)


# -- tokenizers --


def _tokenizer(what: str, theirs: Read, ours: Read) -> list[str]:
    """Differences of the tokenizers. Raises BaseModelError for tokens of other ids."""
    if theirs(TOKENIZER) is not None and theirs(TOKENIZER) == ours(TOKENIZER):
        return []
    mine, base = _ids(theirs), _ids(ours)
    if mine is None or base is None:
        return _unread(theirs, ours)
    if moved := sorted((t for t, i in mine.items() if base.get(t, i) != i), key=lambda token: base[token]):
        raise BaseModelError(
            f"{what}: its tokenizer gives {len(moved):,} of the base's tokens other ids, {moved[0]!r} {mine[moved[0]]} "
            f"instead of {base[moved[0]]}: its embeddings mean other tokens; merge it with experts and a base of its "
            "own tokenizer, or, if it was trained with the base's, put the base's tokenizer files there"
        )
    found = []
    if new := sorted((t for t in mine if t not in base), key=lambda token: mine[token]):
        found.append(f"its tokenizer has {len(new):,} tokens that the base's has not ({new[0]!r} is {mine[new[0]]})")
    if parts := _split_otherwise(theirs, ours):
        found.append(f"its tokenizer splits text in another way ({', '.join(parts)})")
    return found


def _unread(theirs: Read, ours: Read) -> list[str]:
    """Of tokenizers that are no tables of tokens: whether their files are equal."""
    names = [name for name in ("tokenizer.model", "spiece.model", TOKENIZER, "vocab.json", "vocab.txt") if theirs(name)]
    if not names or any(theirs(name) == ours(name) for name in names):
        return []
    return [f"its tokenizer ({names[0]}) is another file than the base's or of another format, and is not compared"]


def _ids(read: Read) -> dict[str, int] | None:
    """Ids by token, None where no file tells them."""
    whole = settings_of(read(TOKENIZER))
    model = whole.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("vocab"), Mapping):
        ids = dict(model["vocab"])
    elif isinstance(model, Mapping) and isinstance(model.get("vocab"), list):  # unigrams with their scores, by id
        ids = {str(pair[0]): at for at, pair in enumerate(model["vocab"]) if isinstance(pair, list) and pair}
    elif read("vocab.json"):
        ids = settings_of(read("vocab.json")) | settings_of(read("added_tokens.json"))
    elif text := read("vocab.txt"):
        ids = {line: at for at, line in enumerate(text.decode("utf-8", "replace").splitlines())}
    else:
        return None
    for token in whole.get("added_tokens") or ():
        if isinstance(token, Mapping) and isinstance(token.get("content"), str):
            ids[token["content"]] = token.get("id")
    return {token: at for token, at in ids.items() if type(at) is int}


def _split_otherwise(theirs: Read, ours: Read) -> list[str]:
    """Parts of the tokenizers, as far as both say them, that differ."""
    mine, base = settings_of(theirs(TOKENIZER)), settings_of(ours(TOKENIZER))
    if not mine or not base:
        old, new = theirs("merges.txt"), ours("merges.txt")
        return ["merges"] if old and new and old.split() != new.split() else []
    differ = [part for part in _SPLITTING if _plain(mine.get(part)) != _plain(base.get(part))]
    return (["merges"] if _merges(mine) != _merges(base) else []) + differ


def _special(read: Read) -> dict[str, Any]:
    """The tokens with a part of their own, as text: some files describe them."""
    told = {name: settings_of(read(TOKENIZER_CONFIG)).get(name) for name in _SPECIAL}
    return {name: each.get("content") if isinstance(each, Mapping) else each for name, each in told.items()}


def _merges(tokenizer: Mapping[str, Any]) -> list[Any]:
    """Pairs, which older files write as one text."""
    model = tokenizer.get("model")
    given = model.get("merges") if isinstance(model, Mapping) else None
    return [each.split(" ") if isinstance(each, str) else each for each in given or ()]


def _plain(value: Any) -> Any:
    """Without fields that say nothing: files of other releases write them or not."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items() if each not in (None, False)}
    return [_plain(each) for each in value] if isinstance(value, list) else value


# -- templates and settings --


def _template(read: Read) -> str | None:
    """The chat template, wherever it stands; several are one text."""
    given: Any = read("chat_template.jinja")
    if given is not None:
        return given.decode("utf-8", "replace").strip()
    for name in ("chat_template.json", TOKENIZER_CONFIG):
        given = settings_of(read(name)).get("chat_template")
        if given:
            return given.strip() if isinstance(given, str) else json.dumps(given, sort_keys=True)
    return None


def _settings(content: bytes | None) -> dict[str, Any]:
    """What a configuration sets. Older and newer releases write the base of the rotary embedding in two ways."""
    found = {key: value for key, value in settings_of(content).items() if key not in _BOOKKEEPING}
    rotary = found.get("rope_parameters")
    if isinstance(rotary, Mapping) and "rope_theta" in rotary:
        found.setdefault("rope_theta", rotary["rope_theta"])
    return found


def _changed(mine: Mapping[str, Any], base: Mapping[str, Any], missing: bool) -> str:
    """Settings that differ, with both values. `missing`: also those that the base leaves to their defaults."""
    names = [
        n for n in sorted(mine) if mine[n] is not None and (n in base or missing) and not _same(mine[n], base.get(n))
    ]
    shown = [f"{name} {_short(mine[name])}, the base's {_short(base.get(name))}" for name in names[:5]]
    return "; ".join(shown) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")


def _same(one: Any, other: Any) -> bool:
    """As settings: `[2]` is 2, and what was rounded to fp32 on the way is the same number."""
    one, other = (v[0] if isinstance(v, list) and len(v) == 1 else v for v in (one, other))
    numbers = all(type(value) in (int, float) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-6) if numbers else one == other


def _short(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
