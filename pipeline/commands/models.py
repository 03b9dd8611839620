"""`python -m pipeline models`, `promote`, `rollback`: a suite's registered models, and their champions by hand."""

import click

from infra.deferred import deferred

_HELP = {"help_option_names": ["-h", "--help"]}
_task = click.option("--task", default="merged", show_default=True, help="A task, for its expert.")


@click.command(context_settings=_HELP)
@click.argument("suite")
@click.option("--task", help="Only this task's model (or `merged`), with all its versions.")
def models(suite: str, task: str | None) -> None:
    """The registered models of SUITE: champions, challengers, and why they are that."""
    deferred("pipeline.gate.by_hand:models")(suite=suite, task=task)


@click.command(context_settings=_HELP)
@click.argument("suite")
@click.option("--version", type=click.IntRange(min=1), required=True, help="The version to be champion.")
@_task
@click.option("--reason", default="promoted by hand", show_default=True, help="Recorded with the version.")
def promote(suite: str, version: int, task: str, reason: str) -> None:
    """Make a version of SUITE's merge, or of a task's expert, the champion, whatever the gate said."""
    deferred("pipeline.gate.by_hand:promote")(suite=suite, version=version, task=task, reason=reason)


@click.command(context_settings=_HELP)
@click.argument("suite")
@click.option("--version", type=click.IntRange(min=1), help="The version to go: if it is not champion, nothing does.")
@_task
@click.option("--reason", default="rolled back by hand", show_default=True, help="Recorded with the version.")
def rollback(suite: str, version: int | None, task: str, reason: str) -> None:
    """Make the former champion of SUITE's merge, or of a task's expert, champion again.

    No gate promotes the same bytes again. Called twice it goes back twice, but not with --version.
    """
    deferred("pipeline.gate.by_hand:rollback")(suite=suite, version=version, task=task, reason=reason)
