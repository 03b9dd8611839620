"""Which mask merges best? Runs the main job for several settings on the prototype's five tasks and prints a table.

    python -m benchmarks.trial --out trial-results [--only NAME …]

Every setting trains the same number of steps on the same rows. Settings are compared by the best mean *validation*
score among their merge candidates. Experts, merges and scores are ordinary artifacts of the store: a second call
reuses them. Needs the local stack (`make up`) and its environment.
"""

import json
import subprocess
import sys
from pathlib import Path

import click
import yaml

from pipeline.records.results import Results
from pipeline.report.candidates import parameters_text

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "benchmarks" / "trial.yaml"


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the reports.")
@click.option("--only", multiple=True, help="Names of settings to run; default: all.")
def main(out: Path, only: tuple[str, ...]) -> None:
    """Run the settings of benchmarks/trial.yaml one after the other."""
    trial = yaml.safe_load(CONFIG.read_text())
    unknown = set(only) - set(trial["settings"])
    if unknown:
        raise click.BadParameter(f"unknown settings {sorted(unknown)}; known: {', '.join(trial['settings'])}")
    out.mkdir(parents=True, exist_ok=True)
    base = out / "config.yaml"
    base.write_text(yaml.safe_dump(trial["config"], sort_keys=False))
    rows = []
    for name, overrides in trial["settings"].items():
        if only and name not in only:
            continue
        arguments = [f"{field}={json.dumps(value)}" for field, value in overrides.items()]
        command = [sys.executable, "pipeline/main.py", "--config", str(base), "--report", str(out / name), *arguments]
        with (out / f"{name}.log").open("w") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
        rows.append(describe(name, Results.model_validate_json((out / name / "results.json").read_text())))
        print(rows[-1], flush=True)
    print("\n| setting | seconds | experts (test) | best merge (validation) | chosen | merged (test) | retention |")
    print("|---|---:|---:|---:|---|---:|---:|")
    print("\n".join(rows))


def describe(name: str, results: Results) -> str:
    """One row of the table."""
    summary = results.summary.held_in
    best = max(candidate.validation for candidate in results.candidates)
    retention = "" if summary.retention is None else f"{summary.retention:.0%}"
    return (
        f"| {name} | {results.seconds.experts:.0f} | {summary.expert:.3f} | {best:.3f} | "
        f"{results.chosen.method} {parameters_text(results.chosen)} | {summary.merged:.3f} | {retention} |"
    )


if __name__ == "__main__":
    main()
