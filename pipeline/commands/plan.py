"""`python -m pipeline plan`: what a run would make and reuse, why each expert is stale, and at what cost."""

import click

from infra.deferred import deferred
from infra.garbage import no_search_for_cycles


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_path", required=True, help="Configuration file (see pipeline/configs/).")
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object on stdout.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.FIELD=VALUE]...")
def plan(config_path: str, as_json: bool, overrides: tuple[str, ...]) -> None:
    """What a run would make and what it would reuse, why each expert is stale, and at what cost. Changes nothing."""
    with no_search_for_cycles():  # a plan keeps nearly all that it makes, modules as well, until its end, which is soon
        deferred("pipeline.plan.show:plan")(config_path=config_path, as_json=as_json, overrides=overrides)
