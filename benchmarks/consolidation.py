"""What is a merge worth, and what do a few steps after it add? Runs of each suite, seed and part, and their tables.

    python -m benchmarks.consolidation --out consolidation-results [--suite NAME …] [--part NAME …] [--seed N …]

Suites and parts stand in benchmarks/consolidation.yaml. A part is one run of the pipeline a seed: the best merge as it
is, the best merge after so many steps on rows of all tasks beside the same steps from the base, the multitask adapter
that sees as many rows as all experts. Merges are chosen on validation rows and reported on test rows. Nothing is
registered, and nothing is made twice: experts, merges and scores are artifacts of the store, and a report that is there
is read. Tables and picture are made of all reports in the folder, those of earlier calls too; `--only-tables` makes
nothing else. Needs the local stack (`make up`) and its environment.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.consolidation_tables import Measured, picture, tables
from benchmarks.pipeline_runs import (
    ROOT,
    Pipeline,
    check_names,
    folder_name,
    made,
    main_job,
    with_floor,
)
from infra.artifacts.manifests import Manifest
from infra.artifacts.snapshot import Snapshot
from infra.errors import DataError, FactoryError
from infra.store.layout import ANNOUNCED, manifest_name, run_file
from infra.store.s3 import Store
from pipeline.config.document import read_yaml
from pipeline.records.results import Results

PLAN = ROOT / "benchmarks" / "consolidation.yaml"
WORK = "work.json"
"""In a report's folder: seconds of what the run made anew, by kind, where a night before is named."""


@dataclass(frozen=True)
class Benchmark:
    """What is compared, where reports are, and who runs the pipeline."""

    plan: Mapping[str, Any]
    out: Path
    pipeline: Pipeline = main_job

    def parts(self, suite: str) -> Mapping[str, Any]:
        """Overrides by part."""
        found: Mapping[str, Any] = self.plan["suites"][suite].get("parts", self.plan["parts"])
        return found

    def folder(self, suite: str, part: str, seed: int) -> Path:
        """Where the report of one run is."""
        return self.out / folder_name(suite) / f"seed-{seed}" / folder_name(part)

    def run(self, suite: str, part: str, seed: int) -> Results:
        """One run, or its report."""
        told = self.plan["suites"][suite]
        candidates = told.get("candidates", self.plan["candidates"])
        before = self.run(told["after"], part, seed) if "after" in told else None
        if before is not None:  # what won the night before, alone
            candidates = [{"method": before.chosen.method, "params": before.chosen.params}]
        config = ROOT / told["config"]
        fields = {
            **_kept(config, told.get("tasks")),
            **told.get("overrides", {}),
            "merge.candidates": candidates if before is not None else with_floor(candidates, told.get("floor")),
            "merge.search.evaluations": self.plan["evaluations"] if before is None else None,
            "evaluate.serving_dtype": None,
            "seeds": [seed],
            **self.parts(suite)[part],
        }
        out = self.folder(suite, part, seed)
        results = made(config, fields, out, self.pipeline)
        if before is not None and not (out / WORK).is_file():
            (out / WORK).write_text(json.dumps(work(Store.from_env(), results.run_id, before.run_id)))
        return results

    def measured(self) -> Iterator[Measured]:
        """All reports that are there, in the order of the plan."""
        for suite, told in self.plan["suites"].items():
            for part in self.parts(suite):
                for seed in told["seeds"]:
                    folder = self.folder(suite, part, seed)
                    if (folder / "results.json").is_file():
                        seconds = json.loads((folder / WORK).read_text()) if (folder / WORK).is_file() else None
                        results = Results.model_validate_json((folder / "results.json").read_text())
                        yield Measured(suite, part, seed, results, seconds)


def _kept(config: Path, tasks: Sequence[str] | None) -> dict[str, Any]:
    """The field that keeps these held-in tasks alone; none where all are kept."""
    if tasks is None:
        return {}
    known = read_yaml(config.read_text(), str(config))["held_in"]
    check_names("tasks", tasks, known)
    return {"held_in": {name: known[name] for name in tasks}}


def work(store: Store, run: str, before: str) -> dict[str, float]:
    """Seconds of work by kind of what one run used and the run before it did not, whoever made it. Test scores, which
    are for the report, are left out. Raises DataError where nothing was new."""
    used, known = (set(json.loads(_announced(store, each))) for each in (run, before))
    found: defaultdict[str, float] = defaultdict(float)
    for manifest in _manifests(store, used - known):
        if manifest.meta.get("split", "validation") == "validation":
            found[manifest.kind] += manifest.meta["seconds"]
    if "expert" not in found:
        raise DataError(f"run {run} made no expert that run {before} did not have: nothing was changed")
    return dict(found)


def _announced(store: Store, run: str) -> bytes:
    found = store.get_with_etag(run_file(run, ANNOUNCED))
    if found is None:
        raise DataError(f"{store.uri(run_file(run, ANNOUNCED))}: not there; the run is not kept any more")
    return found[0]


def _manifests(store: Store, keys: Iterable[str]) -> list[Manifest]:
    """Those that there are; rows and bases have none."""
    snapshot, wanted = Snapshot(store), sorted(keys)
    snapshot.read_ahead(wanted)
    return [
        Manifest.from_json(found[0])
        for found in (snapshot.get_with_etag(manifest_name(key)) for key in wanted)
        if found is not None
    ]


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the reports.")
@click.option("--suite", "suites", multiple=True, help="Suites of the plan; default: all.")
@click.option("--part", "parts", multiple=True, help="Parts of the suites; default: all.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Only these of the suites' seeds.")
@click.option("--only-tables", is_flag=True, help="Run nothing: tables and picture of the reports that are there.")
@click.option(
    "--plan", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=PLAN, help="What is compared."
)
def main(
    out: Path, suites: tuple[str, ...], parts: tuple[str, ...], seeds: tuple[int, ...], only_tables: bool, plan: Path
) -> None:
    """Compare merges, refined merges and the same steps from the base."""
    benchmark = Benchmark(yaml.safe_load(plan.read_text()), out.resolve())
    known = benchmark.plan["suites"]
    check_names("suites", suites, known)
    check_names("parts", parts, {part: None for suite in known for part in benchmark.parts(suite)})
    for suite in [] if only_tables else [name for name in known if not suites or name in suites]:
        for seed in [seed for seed in known[suite]["seeds"] if not seeds or seed in seeds]:
            for part in [part for part in benchmark.parts(suite) if not parts or part in parts]:
                try:
                    found = benchmark.run(suite, part, seed).summary.held_in
                except FactoryError as error:
                    raise click.ClickException(str(error)) from error
                print(f"{suite}, seed {seed}, {part}: merged {found.merged:.3f}", flush=True)
    write(benchmark)


def write(benchmark: Benchmark) -> None:
    """table.md and consolidation.png of the reports that are there; the tables are printed as well."""
    found = list(benchmark.measured())
    if not found:
        raise click.ClickException(f"{benchmark.out}: no reports yet")
    text = tables(found)
    (benchmark.out / "table.md").write_text(text)
    (benchmark.out / "consolidation.png").write_bytes(picture(found))
    print(f"\n{text}")


if __name__ == "__main__":
    main()
