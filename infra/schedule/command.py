"""`python -m pipeline schedule`: the main job at every tick of a cron expression."""

import sys
from pathlib import Path

import click

from infra.deferred import deferred


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cron", required=True, help='Minute hour day month weekday, for example "0 2 * * *".')
@click.option("--config", required=True, type=click.Path(path_type=Path), help="Configuration file of the run.")
@click.option("--timezone", default="UTC", show_default=True, help="Of the cron expression, e.g. Europe/Berlin.")
@click.option("--address", help="Ray's job API (default: $RAY_API_SERVER_ADDRESS).")
@click.option("--grace-hours", type=float, default=12.0, show_default=True, help="A tick missed longer ago is not run.")
@click.option("--max-hours", type=float, help="Stop a run that lasts longer (default: it may take any time).")
@click.option("--webhook", help="POST outcomes there (default: $FACTORY_WEBHOOK_URL, which ps does not show).")
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
def schedule(
    cron: str, config: Path, timezone: str, address: str | None, grace_hours: float, max_hours: float | None,
    webhook: str | None, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Submit the main job at every tick."""
    sys.exit(
        deferred("infra.schedule.scheduler:schedule")(
            cron=cron, config=config, timezone=timezone, address=address, grace_hours=grace_hours,
            max_hours=max_hours, url=webhook, overrides=overrides,
        )
    )  # fmt: skip
