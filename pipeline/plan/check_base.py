"""Whether a base can do what a configuration asks of it: everything that can be known before any training.

The base is loaded as workers load it, on the meta device; the prompt's wrapper is settled with its tokenizer; all rows
are encoded and held against its positions and the rows of its embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from torch import nn

from infra.errors import BaseModelError, ConfigError
from pipeline.config.model import PipelineConfig
from pipeline.data.tasks import TaskData
from pipeline.flow.recipes import prompt_spec
from workers.base.layout import read_shapes
from workers.base.load import empty_classifier, load_classifier_tokenizer, load_tokenizer, stop_ids
from workers.base.modules import Target
from workers.base.prepare import PreparedBase
from workers.base.structure import empty_model
from workers.scoring.classification import encode_labelled
from workers.text.literal import literal_ids_all
from workers.text.prompt import encode_examples, few_shot_ids
from workers.text.rows import Row
from workers.text.wrapper import lacks_bos, settled_wrapper

_POSITIONS = re.compile(r"(?:.*\.)?(?:position_embeddings?|embed_positions|position_embed|wpe)")


@contextmanager
def by_name(base: PreparedBase) -> Iterator[None]:
    """Messages about the base name it, and not the folder of the cache."""
    try:
        yield
    except BaseModelError as error:
        raise BaseModelError(str(error).replace(f"base {base.path}:", f"base {base.name}:")) from error


def empty_base(config: PipelineConfig, base: PreparedBase) -> Any:
    """The base as this configuration's workers load it, without values. BaseModelError for what they would refuse."""
    with by_name(base):
        return empty_classifier(base.path) if config.objective == "classification" else empty_model(base.path)


def base_tokenizer(config: PipelineConfig, base: PreparedBase) -> Any:
    """The tokenizer as this configuration's workers load it."""
    with by_name(base):
        classifies = config.objective == "classification"
        return load_classifier_tokenizer(base.path) if classifies else load_tokenizer(base.path)


def settle_prompt(config: PipelineConfig, base: PreparedBase, tokenizer: Any, console: Console) -> PipelineConfig:
    """The configuration with its wrapper as text, which keys are made of. ConfigError if the base cannot read it."""
    classifies = config.objective == "classification"
    with by_name(base):
        stops = stop_ids(base.path, tokenizer)
    wrapper = settled_wrapper(tokenizer, config.prompt.wrapper, stops, classifies)
    if wrapper != config.prompt.wrapper:
        console.print(f"prompt.wrapper {config.prompt.wrapper!r} is {wrapper!r}", highlight=False, markup=False)
    elif not classifies and lacks_bos(tokenizer, wrapper):
        text = (
            f"this tokenizer begins texts with bos ({tokenizer.bos_token}), prompts in prompt.wrapper do not: write it "
            "there, or take prompt.wrapper=auto"
        )
        console.print(f"notice: {text}", style="yellow", highlight=False, markup=False)
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"wrapper": wrapper})})


def check_adapted(base: PreparedBase, targets: Mapping[str, Target]) -> None:
    """ConfigError unless the weights to adapt are in the base's file under the names that the model has for them: there
    merges and exports look for them."""
    here = read_shapes(base.path)
    for name, target in targets.items():
        if here.get(f"{name}.weight") != tuple(target.module.weight.shape):
            raise ConfigError(
                f"mask.modules selects {name}, whose weight the base's file does not hold under this name (it is "
                "joined or renamed when the model is loaded), so no merge could be written; narrow mask.modules"
            )


def check_rows(
    config: PipelineConfig,
    base: PreparedBase,
    tokenizer: Any,
    model: Any,
    tasks: Mapping[str, TaskData],
    caps: Mapping[str, int],
) -> dict[str, list[int]]:
    """Lengths of each task's training examples in tokens. Every row of every split is encoded as workers encode it.

    `model`: the base without values; `caps`: by task, most tokens of an answer. ConfigError if a text is longer than
    the model has positions, or has a token that its embedding has no row for; DataError for a row that cannot be
    classified.
    """
    positions = most_positions(model)
    lengths = {}
    for name, data in tasks.items():
        lengths[name], longest, largest = _extent(config, tokenizer, data, caps[name])
        if positions is not None and longest > positions:
            few = config.evaluate.few_shot if config.objective == "language_modelling" else 0
            shots = f", with {few} examples before it" if few else ""
            raise ConfigError(
                f"task {name}: its longest text has {longest} tokens (wrapper, template, answer{shots}), the base has "
                f"{positions} positions; lower prompt.max_input_tokens, evaluate.few_shot or prompt.max_target_tokens"
            )
        rows = model.get_input_embeddings().weight.shape[0]
        if largest >= rows:
            raise ConfigError(
                f"task {name}: its texts have the token {tokenizer.convert_ids_to_tokens(largest)!r} of number "
                f"{largest}, the base's embedding has {rows} rows: the tokenizer is another model's, or the text is"
            )
    padding = tokenizer.pad_token_id
    if padding is not None and padding >= model.get_input_embeddings().weight.shape[0]:
        raise ConfigError(
            f"base {base.name}: its padding token {tokenizer.pad_token!r} is number {padding}, which its embedding has "
            "no row for; give the tokenizer that belongs to these weights"
        )
    return lengths


def most_positions(model: Any) -> int | None:
    """Most tokens of a text: as the configuration says, and no more than the tables of learned positions have rows."""
    config = model.config
    said = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    found = [said] if isinstance(said, int) and said > 0 else []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name):
            before = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from behind padding
            found.append(module.num_embeddings - before)
    return min(found, default=None)


def _encoded(
    config: PipelineConfig, tokenizer: Any, data: TaskData, rows: Sequence[Row]
) -> tuple[list[Sequence[int]], list[int]]:
    """Ids of the rows' texts with their answers, and how many of them are the prompt's."""
    prompt = prompt_spec(config, data)
    if config.objective == "classification":
        texts = [encode_labelled(tokenizer, prompt, row, data.labels).input_ids for row in rows]
        return list(texts), [len(ids) for ids in texts]
    examples = encode_examples(tokenizer, prompt, rows, config.prompt.max_target_tokens)
    return [each.input_ids for each in examples], [each.target_start for each in examples]


def _extent(config: PipelineConfig, tokenizer: Any, data: TaskData, cap: int) -> tuple[list[int], int, int]:
    """Lengths of a task's training examples, tokens of its longest text, and its largest token."""
    train = len(data.splits["train"])
    rows = [*data.splits["train"], *(row for split in data.splits if split != "train" for row in data.splits[split])]
    texts, prompts = _encoded(config, tokenizer, data, rows)
    lengths, longest = [len(ids) for ids in texts], max(map(len, texts), default=0)
    if config.objective == "language_modelling":
        choices = literal_ids_all(tokenizer, sorted({option for row in rows for option in row.options or ()}))
        shots = list(data.splits["train"][: config.evaluate.few_shot])
        before = few_shot_ids(tokenizer, prompt_spec(config, data), shots) if shots else []
        longest = max(longest, len(before) + max(prompts, default=0) + max([cap, *map(len, choices)]))
        texts = [*texts, *choices, before]
    return lengths[:train], longest, max((max(ids) for ids in texts if ids), default=0)
