"""`python -m pipeline COMMAND`: everything that people and schedules start, in one place.

Every command lives in a module of its own, which is imported when it is called and not before: listing the commands
costs nothing, and `schedule` runs for months without torch. Exit status: 0 done, 1 failed, 2 bad input.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True)
class _Command:
    """Where a command lives. `attribute` is a click command, or for `plain` a function of the arguments that returns
    the exit status."""

    module: str
    attribute: str
    help: str
    plain: bool = False


COMMANDS: Mapping[str, _Command] = {
    "plan": _Command("pipeline.plan_command", "plan", "What a run would make and reuse, why, and at what cost."),
    "run": _Command("pipeline.main", "main", "Make experts and merge, score and register them."),
    "models": _Command("pipeline.models_command", "models", "A suite's registered models, their versions and aliases."),
    "promote": _Command("pipeline.models_command", "promote", "Make a version the champion by hand."),
    "rollback": _Command("pipeline.models_command", "rollback", "Make the former champion the champion again."),
    "gc": _Command("pipeline.gc_command", "gc", "Remove what no kept run and no registered version needs."),
    "schedule": _Command("infra.schedule", "main", "Submit a run at every tick of a cron expression.", plain=True),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """N tasks and one base model in, N sparse experts and one merged model out."""


def _forward(name: str, command: _Command) -> Callable[..., Any]:
    def call(arguments: tuple[str, ...]) -> None:
        found = getattr(importlib.import_module(command.module), command.attribute)
        if command.plain:
            sys.exit(found(list(arguments)))
        found.main(args=list(arguments), prog_name=f"python -m pipeline {name}")

    return call


for _name, _command in COMMANDS.items():
    main.add_command(
        click.Command(
            _name,
            callback=_forward(_name, _command),
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
            context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
            short_help=_command.help,
            add_help_option=False,  # the command has its own
        )
    )


if __name__ == "__main__":
    main(prog_name="python -m pipeline")
