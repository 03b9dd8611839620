"""`python -m pipeline COMMAND`: everything that people and schedules start, in one place.

Listing and explaining the commands costs nothing, and `schedule` runs for months without torch. Exit status: 0 done,
1 failed, 2 bad input.
"""

import click

from infra.ending import start
from pipeline.commands.gc import gc
from pipeline.commands.models import models, promote, rollback
from pipeline.commands.plan import plan
from pipeline.commands.results_schema import results_schema
from pipeline.commands.run import run
from pipeline.commands.schedule import schedule


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """N tasks and one base model in, N sparse experts and one merged model out."""


for _command in (plan, run, models, promote, rollback, gc, schedule, results_schema):
    main.add_command(_command)


if __name__ == "__main__":
    start(main, "python -m pipeline")
