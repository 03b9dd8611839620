"""Does a step on singular values help? The pipeline for each suite, kind of expert, seed and power, and their tables.

    python -m benchmarks.spectral --out spectral-results [--suite NAME …] [--seed N …]

What is compared stands in benchmarks/spectral.yaml. For each power, the best λ on the validation rows is scored on the
test rows, for every seed by itself; the tables have mean ± standard error over seeds. Experts, merges and scores are
ordinary artifacts of the store, and nothing is registered: a second call, or one after an interruption, makes only what
is missing. Needs the local stack (`make up`) and its environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.pipeline_runs import ROOT, check_names, folder_name, made, spread, with_floor
from pipeline.records.results import Results

PLAN = ROOT / "benchmarks" / "spectral.yaml"


@dataclass(frozen=True)
class Row:
    """Test scores of one method on one suite, a value for each seed."""

    suite: str
    method: str
    chosen: Sequence[str]
    """λ by seed."""
    base: float
    few_shot: float | None
    expert: Sequence[float]
    merged: Sequence[float]
    base_out: float
    merged_out: Sequence[float]

    @property
    def gain(self) -> list[float]:
        """Shares of the experts' gain that the merge keeps, by seed."""
        pairs = zip(self.merged, self.expert, strict=True)
        return [(merged - self.base) / (expert - self.base) for merged, expert in pairs]


def run(suite: Mapping[str, Any], seeds: Sequence[int], candidates: Sequence[Any], out: Path) -> Results:
    """One run of the pipeline with these merge candidates; its results.json."""
    fields = {
        **suite.get("overrides", {}),
        "merge.candidates": with_floor(candidates, suite["floor"]),
        "merge.search.evaluations": None,
        "refine": None,  # merges alone are compared
        "evaluate.serving_dtype": None,
        "seeds": list(seeds),
    }
    return made(ROOT / suite["config"], fields, out)


def row_of(suite: str, method: str, results: Results) -> Row:
    """What one run found."""
    inside, outside, seeds = results.summary.held_in, results.summary.held_out, results.seeds
    assert outside.base is not None
    assert outside.merged is not None
    chosen = seeds.chosen if seeds else [results.chosen]
    return Row(
        suite=suite,
        method=method,
        chosen=[f"{each.params['lambda']:g}" for each in chosen],
        base=inside.base,
        few_shot=inside.base_few_shot,
        expert=seeds.summary.held_in["expert"].values if seeds else [inside.expert],
        merged=seeds.summary.held_in["merged"].values if seeds else [inside.merged],
        base_out=outside.base,
        merged_out=seeds.summary.held_out["merged"].values if seeds else [outside.merged],
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| suite | merge | λ by seed | held-in | of the experts' gain | held-out |",
        "|---|---|---|---:|---:|---:|",
    ]
    for suite in dict.fromkeys(row.suite for row in rows):
        own = [row for row in rows if row.suite == suite]
        first = own[0]
        few = "" if first.few_shot is None else f", few-shot base {first.few_shot:.3f}"
        about = f"base {first.base:.3f}{few}, experts {spread(first.expert)}; held-out base {first.base_out:.3f}"
        lines.append(f"| **{suite}** ({len(first.merged)} seed{'s' * (len(first.merged) > 1)}; {about}) | | | | | |")
        for row in own:
            cells = [spread(row.merged), spread(row.gain, percent=True), spread(row.merged_out)]
            lines.append(f"| | {row.method} | {', '.join(row.chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the reports.")
@click.option("--suite", "suites", multiple=True, help="Suites of benchmarks/spectral.yaml; default: all.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Only these of the suites' seeds.")
def main(out: Path, suites: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Compare the powers of benchmarks/spectral.yaml."""
    plan = yaml.safe_load(PLAN.read_text())
    check_names("suites", suites, plan["suites"])
    out, rows = out.resolve(), []
    for name, suite in plan["suites"].items():
        own = [seed for seed in suite["seeds"] if not seeds or seed in seeds]
        if (suites and name not in suites) or not own:
            continue
        for method, candidates in plan["methods"].items():
            results = run(suite, own, candidates, out / folder_name(name) / method.split(" (")[0].replace(" ", ""))
            rows.append(row_of(name, method, results))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    text = table(rows) + "\n"
    (out / "table.md").write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
