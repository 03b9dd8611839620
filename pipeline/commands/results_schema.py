"""`python -m pipeline results-schema`: what programs that read results.json may rely on."""

import click

from infra.deferred import deferred


@click.command("results-schema", context_settings={"help_option_names": ["-h", "--help"]})
def results_schema() -> None:
    """Print the JSON Schema of results.json: every field, its type and its meaning."""
    deferred("pipeline.records.results:print_schema")()
