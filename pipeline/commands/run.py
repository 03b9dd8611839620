"""`python pipeline/main.py`, `python -m pipeline run`: the main job."""

from pathlib import Path

import click

from infra.deferred import deferred


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_path", required=True, help="Configuration file (see pipeline/configs/).")
@click.option(
    "--report", type=click.Path(file_okay=False, path_type=Path), help="Also write the report to this folder."
)
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
def run(config_path: str, report: Path | None, overrides: tuple[str, ...]) -> None:
    """Train an expert per held-in task, merge them, score everything, register the results."""
    deferred("pipeline.running.driver:main")(config_path=config_path, report=report, overrides=overrides)
