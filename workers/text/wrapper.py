"""What stands around a task's text: the chat template of a tokenizer as a wrapper, and what is refused about one.

A wrapper is text with `{prompt}` in it, and perhaps `{answer}` with what ends an answer behind it; `AUTO` stands for
the tokenizer's own. Which text it stands for is settled once, before anything is made, so keys and registered models
hold the text. Rendering and tokenising with it is `workers.text.prompt`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection
from typing import Any

from infra.errors import ConfigError
from workers.text.prompt import ANSWER, tokenize

AUTO = "auto"
_PROMPT, _ANSWER = "PROMPTxGOESxHERE", "ANSWERxGOESxHERE"
_CONTROL = re.compile(
    r"<\|[^<>|\s]+\|>|<｜[^<>｜]+｜>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn|end_of_utterance)>|\[(?:CLS|SEP)\]"
)
"""What looks like a control token of some family: text that nobody writes for its own sake."""
_TODAY = datetime.date(2025, 1, 1)
_CODES = ("%d", "%m", "%Y", "%y", "%b", "%B", "%A")
_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f".replace('{code}', '{_TODAY.strftime(code)}')" for code in _CODES)
    + " }}{%- endmacro %}"
)
"""Stands in for transformers' own function of a template; functions cannot be handed to templates."""


def own_wrapper(tokenizer: Any, stops: Collection[int], classifies: bool = False) -> str:
    """The wrapper that `AUTO` stands for.

    With a chat template: one user's turn and the beginning of the answer, as the template writes them, default system
    prompt included; where an answer does not end with eos but with another token that generation stops at (`stops`: its
    ids, eos or not), that as well. A template that writes today's date gets a fixed one, so that keys do not change
    overnight. Without a template: the text and a newline. For classification: the text alone.

    The text begins with bos if the tokenizer begins its texts so (in classification it does so by itself). ConfigError
    for a template that cannot be asked for a user's turn.
    """
    if classifies:
        return "{prompt}"
    if not tokenizer.chat_template:
        return _with_bos(tokenizer, "{prompt}\n")
    text = _rendered(tokenizer, [{"role": "user", "content": _PROMPT}], True)
    if text.count(_PROMPT) != 1 or "{input}" in text or "{options}" in text:
        raise ConfigError(
            "prompt.wrapper is auto, but the base's chat template does not write a user's text once, as it is; "
            "write the wrapper out, with {prompt} in it"
        )
    return _with_bos(tokenizer, text.replace(_PROMPT, "{prompt}")) + _own_end(tokenizer, stops)


def check_wrapper(tokenizer: Any, wrapper: str) -> None:
    """ConfigError if the wrapper has control tokens that this tokenizer does not know: it would read them as letters.

    Known is also what the tokenizer's chat template writes, token or not.
    """
    template = str(tokenizer.chat_template or "")
    for found in _CONTROL.findall(wrapper):
        ids = tokenize(tokenizer, found)
        known = len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or found == tokenizer.unk_token)
        if not known and found not in template:
            own = "its own chat template (prompt.wrapper=auto)" if template else "text that it knows"
            raise ConfigError(
                f"prompt.wrapper has {found}, which is no token of this base but {len(ids)} ordinary ones; take {own}"
            )


def settled_wrapper(tokenizer: Any, wrapper: str, stops: Collection[int], classifies: bool) -> str:
    """The wrapper as text that this tokenizer understands: `AUTO` replaced, and in classification without the bos that
    the tokenizer adds by itself. ConfigError as `own_wrapper` and `check_wrapper`."""
    if wrapper == AUTO:
        return own_wrapper(tokenizer, stops, classifies)
    check_wrapper(tokenizer, wrapper)
    if (end := tokenize(tokenizer, wrapper.partition(ANSWER)[2])) and not classifies and end[0] not in stops:
        raise ConfigError(
            f"prompt.wrapper ends answers with {wrapper.partition(ANSWER)[2]!r}, which generation does not stop at; "
            "end them with a token that the base's generation_config.json lists as eos, or leave {answer} out"
        )
    bos = tokenizer.bos_token
    return wrapper.removeprefix(bos) if classifies and bos and adds_bos(tokenizer) else wrapper


def lacks_bos(tokenizer: Any, wrapper: str) -> bool:
    """Whether the tokenizer begins texts with bos, and prompts in this wrapper do not."""
    return adds_bos(tokenizer) and tokenize(tokenizer, wrapper)[:1] != [tokenizer.bos_token_id]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins texts with bos by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _with_bos(tokenizer: Any, wrapper: str) -> str:
    return f"{tokenizer.bos_token}{wrapper}" if lacks_bos(tokenizer, wrapper) else wrapper


def _own_end(tokenizer: Any, stops: Collection[int]) -> str:
    """`{answer}` and the token that ends an answer in the template; nothing where that is eos, or generation would run
    on behind it."""
    turns = [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _ANSWER}]
    try:
        after = _rendered(tokenizer, turns, False).partition(_ANSWER)[2]
    except ConfigError:  # of one turn only
        return ""
    ids = tokenize(tokenizer, after)
    if not ids or ids[0] == tokenizer.eos_token_id or ids[0] not in stops:
        return ""
    return ANSWER + str(tokenizer.convert_ids_to_tokens(ids[0]))


def _rendered(tokenizer: Any, turns: list[dict[str, str]], asks: bool) -> str:
    try:
        template = tokenizer.get_chat_template()
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=(_DATE if "strftime_now" in template else "") + template, tokenize=False,
                add_generation_prompt=asks, date_string=_TODAY.strftime("%d %b %Y"),
            )
        )  # fmt: skip
    except Exception as error:  # templates are programs and raise what they like
        raise ConfigError(
            f"prompt.wrapper is auto, but the base's chat template fails ({' '.join(str(error).split())[:200]}); "
            "write the wrapper out, with {prompt} in it"
        ) from error
