"""Token ids of text that holds data: what looks like a control token in data is text and never that token.

A prompt is pieces of two kinds. In a frame (wrapper and template), `<|im_end|>` is the token; in a row's input, options
or answers it is eleven characters that somebody wrote, or else data could end a turn, or teach a model to stop in the
middle. Where no data holds such a text, ids are those of one call of the tokenizer on the whole.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.errors import DataError


@dataclass(frozen=True)
class Piece:
    """A part of a prompt: as the wrapper or the template has it, or `data`."""

    text: str
    data: bool = False


@dataclass(frozen=True)
class _Control:
    """A control token: its id, and whether it takes the blanks before or behind it along."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class _Controls:
    """A tokenizer's control tokens by text, what finds them, and which ids no data may have."""

    tokens: Mapping[str, _Control]
    pattern: re.Pattern[str]
    forbidden: frozenset[int]


@functools.lru_cache(maxsize=8)
def _controls(tokenizer: Any) -> _Controls:
    added = {
        str(token.content): _Control(number, bool(token.lstrip), bool(token.rstrip))
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    tokens = {name: _Control(int(number)) for name, number in named.items() if name} | {
        k: v for k, v in added.items() if k
    }
    longest_first = sorted(tokens, key=lambda text: (-len(text), text))
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    return _Controls(tokens, pattern, frozenset(t.id for t in tokens.values()) - {tokenizer.unk_token_id})


def holds_control(tokenizer: Any, text: str) -> bool:
    """Whether a control token is spelt out in `text`."""
    return _controls(tokenizer).pattern.search(text) is not None


def literal_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` with control tokens in it as the text that they are. DataError if the vocabulary has no other
    spelling of one."""
    controls = _controls(tokenizer)
    if not controls.pattern.search(text):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    if controls.forbidden.isdisjoint(ids):
        return ids
    # The vocabulary has the token's text as one piece (Unigram, whole words): cut in two, it is found no more.
    cuts = [0, *(match.start() + 1 for match in controls.pattern.finditer(text)), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(cuts) if start < end]
    if len(parts) < 2:
        raise DataError(
            f"{text!r} is a control token of the base's tokenizer, which cannot write it as text; drop the row"
        )
    return [number for part in parts for number in literal_ids(tokenizer, part)]


def literal_ids_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Every text as `literal_ids` gives it; those without control tokens in one call."""
    return rendered_ids_all(tokenizer, [[Piece(text, data=True)] for text in texts])


def rendered_ids(tokenizer: Any, pieces: Sequence[Piece], add_special_tokens: bool = False) -> list[int]:
    """Ids of a prompt whose pieces are data or not; with what the tokenizer itself puts around a text, if asked for."""
    found = _spelt(tokenizer, pieces)
    if found is None:
        return list(
            tokenizer("".join(piece.text for piece in pieces), add_special_tokens=add_special_tokens)["input_ids"]
        )
    return _surrounded(tokenizer, found) if add_special_tokens else found


def rendered_ids_all(tokenizer: Any, prompts: Sequence[Sequence[Piece]]) -> list[list[int]]:
    """Every prompt as `rendered_ids` gives it; those without control tokens in their data in one call."""
    if not prompts:
        return []
    spelt = [_spelt(tokenizer, pieces) for pieces in prompts]
    plain = ["".join(piece.text for piece in p) for p, ids in zip(prompts, spelt, strict=True) if ids is None]
    together = iter(tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else ())
    return [list(next(together)) if ids is None else ids for ids in spelt]


def _spelt(tokenizer: Any, pieces: Sequence[Piece]) -> list[int] | None:
    """Ids of pieces whose data holds control tokens; None if none does, so that the whole is tokenised as one text."""
    controls = _controls(tokenizer)
    segments: list[str | _Control] = [""]  # texts and the frames' control tokens, in turn

    def add(text: str) -> None:
        segments[-1] = f"{segments[-1]}{text}"

    for piece in pieces:
        at = 0
        for match in () if piece.data else controls.pattern.finditer(piece.text):
            add(piece.text[at : match.start()])
            segments += [controls.tokens[match.group()], ""]
            at = match.end()
        add(piece.text[at:])
    texts = [text for text in segments if isinstance(text, str)]
    if not any(controls.pattern.search(text) for text in texts):
        return None
    ids: list[int] = []
    for place, segment in enumerate(segments):
        if isinstance(segment, _Control):
            ids.append(segment.id)
            continue
        before, after = (
            segments[place - 1] if place else None,
            segments[place + 1] if place + 1 < len(segments) else None,
        )
        text = segment.lstrip() if isinstance(before, _Control) and before.rstrip else segment
        text = text.rstrip() if isinstance(after, _Control) and after.lstrip else text
        ids += literal_ids(tokenizer, text) if text else []
    return ids


def _surrounded(tokenizer: Any, ids: list[int]) -> list[int]:
    """With the special tokens that the tokenizer puts around every text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return [*whole[:start], *ids, *whole[start + len(bare) :]]
