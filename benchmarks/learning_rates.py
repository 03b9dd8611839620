"""Which learning rate suits which kind of expert? Validation losses of short trainings on real tasks.

    python -m benchmarks.learning_rates [--kind lora --rate 1e-3 …] [--task past_tense …] [--steps 20] [--seed 0 …]

Tasks, rows, prompt and modules are the quickstart's; every kind and rate sees the same batches. The table shows the
mean best validation loss over tasks and seeds; defaults in pipeline/flow/recipes.py are its best rates. No Ray, no
merging: what a rate does to a merge is measured by benchmarks/trial.py.
"""

import statistics
from collections.abc import Sequence

import click
import torch

from infra.environment import versions
from pipeline.config.model import PipelineConfig, load_config
from pipeline.data.tasks import TaskData, load_tasks
from pipeline.flow.recipes import expert_spec, prompt_spec, train_spec
from workers.base.cache import cache_dir
from workers.base.load import load_model, load_tokenizer
from workers.base.prepare import prepare_base
from workers.text.prompt import encode_example
from workers.training.loop import train_expert
from workers.training.objectives import LanguageModelling

QUICKSTART = "pipeline/configs/quickstart.yaml"
KINDS = {
    "block": ["mask.granularity=block"],
    "element": ["mask.granularity=element"],
    "row": ["mask.granularity=row"],
    "sensitivity": ["mask.granularity=element", "mask.criterion=connection_sensitivity"],
    "lora": ["expert=lora"],
    "full": ["expert=full"],
}
RATES = {
    "block": (1e-3, 2e-3, 4e-3, 8e-3),
    "element": (1e-3, 2e-3, 4e-3, 8e-3),
    "row": (1e-3, 2e-3, 4e-3, 8e-3),
    "sensitivity": (5e-4, 1e-3, 2e-3, 4e-3),
    "lora": (1e-3, 2e-3, 4e-3, 8e-3),
    "full": (5e-5, 1e-4, 2e-4, 5e-4),
}


@click.command()
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Default: all.")
@click.option("--rate", "rates", multiple=True, type=float, help="Default: four that suit the kind.")
@click.option("--task", "names", multiple=True, default=("past_tense", "question_formation", "unnatural_dates"))
@click.option("--steps", default=20, show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,))
@click.option("--threads", default=1, show_default=True)
def main(
    kinds: Sequence[str], rates: Sequence[float], names: Sequence[str], steps: int, seeds: Sequence[int], threads: int
) -> None:
    """Print the table, one row as soon as it is known."""
    torch.set_num_threads(threads)
    found = versions()
    print(f"{found['machine']}, torch {found['torch']}; {steps} steps, tasks {', '.join(names)}, seeds {list(seeds)}\n")
    print("| kind | rate | mean best validation loss | of each task |\n|---|---:|---:|---|", flush=True)
    plain = load_config(QUICKSTART)
    chosen = {name: plain.held_in[name] for name in names}
    tasks = load_tasks(chosen, cache_dir(), plain.splits.model_dump(), plain.seed)
    for kind in kinds or list(KINDS):
        for rate in rates or RATES[kind]:
            losses: dict[str, list[float]] = {name: [] for name in names}
            for seed in seeds:
                overrides = [*KINDS[kind], f"train.steps={steps}", f"train.learning_rate={rate}", f"seed={seed}"]
                config = load_config(QUICKSTART, overrides)
                for name in names:
                    losses[name].append(best_loss(config, tasks[name]))
            means = {name: statistics.fmean(values) for name, values in losses.items()}
            each = ", ".join(f"{value:.3f}" for value in means.values())
            print(f"| {kind} | {rate:g} | {statistics.fmean(means.values()):.4f} | {each} |", flush=True)


def best_loss(config: PipelineConfig, data: TaskData) -> float:
    """Best validation loss of one expert."""
    path = prepare_base(config.base, cache_dir()).path
    tokenizer, prompt = load_tokenizer(path), prompt_spec(config, data)
    limit = config.prompt.max_target_tokens
    train, validation = (
        [encode_example(tokenizer, prompt, row, max_target_tokens=limit) for row in data.splits[split]]
        for split in ("train", "validation")
    )
    model = load_model(path, getattr(torch, config.train.compute_dtype))
    objective = LanguageModelling(tokenizer.pad_token_id)
    return train_expert(
        model, objective, train, validation, expert_spec(config, data), train_spec(config, data)
    ).best_validation_loss


if __name__ == "__main__":
    main()
