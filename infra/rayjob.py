"""One scheduled retraining on Kubernetes. Runs in the CronJob's pod, whose manifest names this module:

    python -m infra.rayjob /etc/expert-factory/rayjob.yaml

Exit status: 0 the RayJob succeeded; 1 it did not, or is gone; 2 bad input. The work is `infra.schedule.rayjob`.
"""

import sys
from pathlib import Path

import click

from infra.deferred import deferred
from infra.ending import start


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("manifest", type=click.Path(path_type=Path))
def main(manifest: Path) -> None:
    """Run the RayJob in the file MANIFEST to its end."""
    sys.exit(deferred("infra.schedule.rayjob:retrain")(manifest=manifest))


if __name__ == "__main__":
    start(main, "python -m infra.rayjob")
