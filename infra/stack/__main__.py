"""`python -m infra.stack`: the local stack. Options and their meaning; the work is `infra.stack.command`."""

import sys
from pathlib import Path

import click

from infra.deferred import deferred
from infra.ending import start


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("command", type=click.Choice(["up", "down", "status", "env"]))
@click.option("--home", type=click.Path(path_type=Path), help="Its folder (default: $FACTORY_HOME, else ./.factory).")
@click.option("--num-cpus", type=int, help="CPUs that Ray may use (default: all).")
@click.option("--object-store-mib", type=int, default=512, show_default=True, help="Ray's object store.")
def main(command: str, home: Path | None, num_cpus: int | None, object_store_mib: int) -> None:
    """The local stack: S3, MLflow, Ray. Start it, stop it, say how it is, or print the variables of its clients."""
    sys.exit(
        deferred("infra.stack.command:run")(
            command=command, home=home, num_cpus=num_cpus, object_store_mib=object_store_mib
        )
    )


if __name__ == "__main__":
    start(main, "python -m infra.stack")
