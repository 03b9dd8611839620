"""`python -m pipeline gc`: collection of what nothing needs."""

import click

from infra.deferred import deferred


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--keep-days", type=click.FloatRange(min=0), help="Keep runs that ended within so many days; else all.")
@click.option(
    "--min-age-hours", type=click.FloatRange(min=0), default=24.0, show_default=True,
    help="Remove nothing younger. Less than a day only while no run is in progress.",
)  # fmt: skip
@click.option("--forget-unknown-runs", is_flag=True, help="Do not keep runs that MLflow does not know (purged ones).")
@click.option("--list", "listed", is_flag=True, help="Also print every single thing that would go.")
@click.option("--remove", is_flag=True, help="Remove what the table says goes.")
def gc(keep_days: float | None, min_age_hours: float, forget_unknown_runs: bool, listed: bool, remove: bool) -> None:
    """Remove what no kept run and no registered version needs. Without --remove: only say what."""
    deferred("pipeline.collection.command:gc")(
        keep_days=keep_days, min_age_hours=min_age_hours, forget_unknown_runs=forget_unknown_runs, listed=listed,
        remove=remove,
    )  # fmt: skip
