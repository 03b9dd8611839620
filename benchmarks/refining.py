"""What a refining step costs: seconds and padding of batches of all tasks' rows, whole and cut by length.

    python -m benchmarks.refining [--config pipeline/configs/quickstart.yaml] [--steps 4] [--threads 2]

Rows, prompts, positions and optimisation are those that a run of the configuration with `refine` would have; training
starts from the base, which costs what starting from a merge costs. `whole`: all rows of a batch in one forward pass;
`rows`: in the order of their lengths, as many at a time as an expert's training runs; `cut`: as refining does it.
Processor time tells more than the clock where the machine has other work. No Ray, no store.
"""

import statistics
import time
from dataclasses import replace

import click
import torch

from infra.environment import versions
from pipeline.config.model import PipelineConfig, load_config
from pipeline.data.tasks import TaskData, load_tasks
from pipeline.flow.recipes import pooled_order, prompt_spec, refine_mask, refine_train
from workers.base.cache import cache_dir
from workers.base.load import load_model, load_tokenizer
from workers.base.prepare import prepare_base
from workers.text.prompt import Example, encode_examples
from workers.training.batches import Batch, mixed_batches, padding_share
from workers.training.loop import train_expert
from workers.training.objectives import language_modelling


@click.command()
@click.option("--config", "path", default="pipeline/configs/quickstart.yaml", show_default=True)
@click.option("--steps", default=4, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--padding-only", is_flag=True, help="Count tokens, train nothing.")
def main(path: str, steps: int, threads: int, padding_only: bool) -> None:
    """Print what was measured."""
    torch.set_num_threads(threads)
    config = load_config(path, ["refine={}"])
    tasks = load_tasks(config.held_in, cache_dir(), config.splits.model_dump(), config.seed)
    base = prepare_base(config.base, cache_dir()).path
    tokenizer = load_tokenizer(base)
    pools = [encoded(config, tokenizer, tasks[name]) for name in pooled_order(config, tasks)]
    lengths = [[len(example.input_ids) for example in pool] for pool in pools]
    flat = [length for pool in lengths for length in pool]
    refine = config.refine
    assert refine is not None
    spec = refine_train(config, refine, 100)
    size = spec.micro_batch_size or spec.batch_size
    cut = mixed_batches(lengths, 1, spec.steps, spec.seed, size)
    ways: dict[str, list[Batch]] = {
        "whole": [[joined(batch)] for batch in cut],
        "rows": [[joined(batch)[at : at + size] for at in range(0, spec.batch_size, size)] for batch in cut],
        "cut": cut,
    }
    found = versions()
    print(f"{found['machine']}, torch {found['torch']}, {threads} threads; {statistics.fmean(flat):.0f} tokens a row")
    print(f"{spec.batch_size} rows a step, one of each of {len(pools)} tasks, at most {size} at a time\n")
    print("| batches | parts a step | padding |\n|---|---:|---:|")
    for name, batches in ways.items():
        parts = statistics.fmean(map(len, batches))
        print(f"| {name} | {parts:.1f} | {padding_share(batches, flat):.1%} |", flush=True)
    if padding_only:
        return
    model = load_model(base, torch.float32)
    objective = language_modelling(model, int(tokenizer.pad_token_id))
    examples = [example for pool in pools for example in pool]
    print("\n| batches | seconds a step | of them processor time, by thread |\n|---|---:|---:|")
    for name, batches in ways.items():
        ends: list[tuple[float, float]] = []
        train_expert(
            model, objective, examples, [], refine_mask(config, refine), replace(spec, steps=steps + 1),
            batches=batches[: steps + 1],  # the first one warms up
            on_step=lambda report, ends=ends: ends.append((time.perf_counter(), time.process_time())),  # type: ignore[misc]
        )  # fmt: skip
        walls, worked = ((last - first) / steps for first, last in zip(ends[0], ends[-1], strict=True))
        print(f"| {name} | {walls:.2f} | {worked / threads:.2f} |", flush=True)


def encoded(config: PipelineConfig, tokenizer: object, data: TaskData) -> list[Example]:
    """A task's training rows as the run encodes them."""
    return encode_examples(tokenizer, prompt_spec(config, data), data.splits["train"], config.prompt.max_target_tokens)


def joined(batch: Batch) -> list[int]:
    """A batch's rows, longest first."""
    return [row for part in batch for row in part]


if __name__ == "__main__":
    main()
