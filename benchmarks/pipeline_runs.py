"""Runs of the pipeline that benchmarks compare: made by the main job, kept by folder, nothing made twice.

Experts, merges and scores are ordinary artifacts of the store. A report whose run was asked for in the same words is
read, not made again; any other run finds in the store what there is and makes the rest.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.records.results import Results

ROOT = Path(__file__).resolve().parent.parent
ASKED = "asked.json"
"""In a report's folder: what the run was asked for."""

Pipeline = Callable[[Path, Sequence[str], Path], None]
"""Runs a configuration with overrides and leaves a report in a folder; raises where that fails."""


def main_job(config: Path, overrides: Sequence[str], out: Path) -> None:
    """The main job, in a process of its own; its log stands beside the folder of the report. Raises ClickException."""
    command = [sys.executable, "pipeline/main.py", "--config", str(config), "--report", str(out), *overrides]
    told = out.with_name(f"{out.name}.log")
    with told.open("w") as log:
        ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        raise click.ClickException(f"the run ended with status {ended.returncode}; {told} says why")


def made(config: Path, fields: Mapping[str, Any], out: Path, pipeline: Pipeline = main_job) -> Results:
    """The results of a configuration with other values of these fields. Nothing is registered. Raises
    what the pipeline raises."""
    fields = {**fields, "registers": False}
    asked = json.dumps({"config": config.read_text(), "fields": fields}, indent=1)
    if not (out / ASKED).is_file() or (out / ASKED).read_text() != asked:
        out.mkdir(parents=True, exist_ok=True)
        (out / ASKED).unlink(missing_ok=True)
        pipeline(config, [f"{name}={json.dumps(value)}" for name, value in fields.items()], out)
        (out / ASKED).write_text(asked)
    return Results.model_validate_json((out / "results.json").read_text())


def with_floor(candidates: Sequence[Mapping[str, Any]], floor: float | None) -> list[dict[str, Any]]:
    """The candidates, each spectral power with this floor."""
    more = {} if floor is None else {"floor": floor}
    return [
        {**each, "params": {**each.get("params", {}), **(more if each["method"] == "spectral_power" else {})}}
        for each in candidates
    ]


def check_names(what: str, asked: Sequence[str], known: Mapping[str, Any]) -> None:
    """Raises click.BadParameter for a name that is not known."""
    if unknown := set(asked) - set(known):
        raise click.BadParameter(f"unknown {what} {sorted(unknown)}; known: {'; '.join(known)}")


def folder_name(name: str) -> str:
    """A suite's name as a folder's."""
    return name.replace(", ", "-").replace(" ", "-")


def spread(values: Sequence[float], percent: bool = False, signed: bool = False) -> str:
    """Mean ± standard error."""
    scale, digits = (100, 0) if percent else (1, 3)
    text = f"{scale * statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * standard_error(values):.{digits}f}"
    return text + " %" * percent


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values."""
    return statistics.stdev(values) / len(values) ** 0.5
