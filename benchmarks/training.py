"""What a training step costs and needs, for every mask, PEFT's LoRA and SHiRA, a dense mask, and full fine-tuning.

    python -m benchmarks.training [--modules attention] [--tokens 512] [--rounds 5] [--json FILE]
    python -m benchmarks.training --device cuda --dtype bfloat16 --shape 1b --tokens 4096

Time: rounds are interleaved, every case runs once per round after one step that does not count, on the same batch and a
fresh copy of the same model; medians are compared. The floor is the frozen model's forward and input-gradient backward;
a step includes AdamW and everything that makes it take effect. Memory: the peak of two steps above the floor's peak,
on the CPU the resident size of a process of its own. Files hold bf16 values. Does not cover the quality of what is
trained.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.training_cases import CASES, REFERENCE, SHAPES, Setup, build_batch, build_model
from benchmarks.training_memory import Footprint, measure_footprints
from infra.environment import versions
from workers.masks.spec import match_modules

WARM_UP = 2
"""Steps of each case that are not counted: allocations, and code that runs for the first time."""
METHODS = [name for name in CASES if name not in ("floor", REFERENCE)]
STATE_BYTES = {"element": 20, "n_m": 20, "block": 16, "row": 16, "column": 16}
"""Of one trained value: itself, gradient and two moments, 4 bytes each; 4 more for an element's position. The original
adds what one weight takes."""


@dataclass(frozen=True)
class Timing:
    """Seconds of each counted step."""

    wall: list[float]
    cpu: list[float]


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--modules", default="attention", show_default=True, help="A preset or a regular expression.")
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="smollm2", show_default=True)
@click.option("--layers", type=int, help="Default: 6 for smollm2, 18 for 1b.")
@click.option("--tokens", default=512, show_default=True, help="Tokens per step.")
@click.option("--sequences", default=4, show_default=True, help="Rows that the tokens are in.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--density", default=0.05, show_default=True, help="Of all masks; SHiRA gets as many values.")
@click.option("--rank", default=16, show_default=True, help="Of LoRA.")
@click.option("--block", default=16, show_default=True, help="Side of a block.")
@click.option("--group", default=16, show_default=True, help="M of N:M.")
@click.option("--only", multiple=True, type=click.Choice(METHODS), help="Beside the floor; default: all.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows here.")
def main(rounds: int, threads: int, only: tuple[str, ...], json_path: Path | None, **options: Any) -> None:
    """Measure every case and print a Markdown table."""
    warnings.filterwarnings("ignore")  # PEFT's SHiRA warns about sparse tensors in every layer
    torch.set_num_threads(threads)
    options["layers"] = options["layers"] or SHAPES[options["shape"]]["num_hidden_layers"]
    setup = Setup(**options)
    if setup.tokens % setup.sequences:
        raise click.BadParameter(f"--tokens {setup.tokens} must be a multiple of --sequences {setup.sequences}")
    names = ["floor", REFERENCE, *(name for name in METHODS if not only or name in only)]
    footprints = measure_footprints(names, setup, threads)
    timings = measure_times(names, setup, rounds)
    rows = [to_row(name, timings, footprints) for name in names]
    report = {
        "machine": machine(setup),
        "versions": {"peft": version("peft"), **{k: v for k, v in versions().items() if k != "machine"}},
        "settings": {**asdict(setup), "rounds": rounds, "threads": threads},
        "rows": rows,
    }
    click.echo(as_text(report, footprints, setup))
    if json_path is not None:
        found = [row for row in rows if row["name"] != REFERENCE]  # no method: it is what elements are held against
        json_path.write_text(json.dumps({**report, "rows": found}, indent=1) + "\n")


def machine(setup: Setup) -> str:
    """The processor, and the accelerator where one is used."""
    found = versions()["machine"]
    return f"{found}, {torch.cuda.get_device_name(setup.device)}" if setup.on_cuda else found


def measure_times(names: list[str], setup: Setup, rounds: int) -> dict[str, Timing]:
    """Interleaved: one step of every case in each round, all cases alive side by side, after two warm-up steps each.

    Each case has a model of its own, so that none pays for putting another one's changes back.
    """
    model, batch = build_model(setup), build_batch(setup)
    cases = {name: CASES[name](copy.deepcopy(model), batch, setup) for name in names}
    timings = {name: Timing([], []) for name in names}
    for number in range(WARM_UP + rounds):
        for name, case in cases.items():
            _wait(setup)
            wall, cpu = time.perf_counter(), time.process_time()
            case.step()
            _wait(setup)
            if number >= WARM_UP:
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].cpu.append(time.process_time() - cpu)
    return timings


def _wait(setup: Setup) -> None:
    if setup.on_cuda:
        torch.cuda.synchronize(setup.device)


def to_row(name: str, timings: dict[str, Timing], footprints: dict[str, Footprint]) -> dict[str, Any]:
    """One row of the report; what has no meaning for a case is None."""
    timing, size, base = timings[name], footprints[name], footprints["floor"]
    wall = statistics.median(timing.wall)
    return {
        "name": name,
        "ms_per_step": wall * 1e3,
        "cpu_s_per_step": statistics.median(timing.cpu),
        "ratio_to_floor": wall / statistics.median(timings["floor"].wall),
        "peak_bytes_over_base": size.peak - base.peak,
        "trainable": size.trainable,
        "file_bytes": size.file_bytes,
        "bytes_per_nonzero": size.file_bytes / size.trainable if size.file_bytes else None,
    }


def as_text(report: dict[str, Any], footprints: dict[str, Footprint], setup: Setup) -> str:
    """Machine, versions and settings, the Markdown table, and how to read its columns."""
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    with torch.device("meta"):
        model = build_model(_on(setup, "meta"))
        shapes = [module.weight for module in match_modules(model, setup.modules).values()]
    total, adapted = sum(p.numel() for p in model.parameters()), sum(weight.numel() for weight in shapes)
    itemsize = getattr(torch, setup.dtype).itemsize
    layer = max(weight.numel() for weight in shapes) * itemsize
    floor_cpu = report["rows"][0]["cpu_s_per_step"]
    heads = (
        "case", "ms/step", "CPU s", "wall ÷ floor", "CPU ÷ floor", "tokens/s", "trained", "peak over floor MiB",
        "of which inputs kept MiB", "model MiB", "file MB", "file B per value",
    )  # fmt: skip
    lines = [
        f"{report['machine']}; {versions}",
        f"{settings}; {total / 1e6:.0f} M parameters, {adapted / 1e6:.1f} M in the {len(shapes)} adapted modules",
        "",
        f"| {' | '.join(heads)} |",
        f"|---|{'---:|' * (len(heads) - 1)}",
    ]
    for row in report["rows"]:
        name = row["name"]
        kept = footprints[name].kept - footprints["floor"].kept
        state = (STATE_BYTES[name] + itemsize) * row["trainable"] + layer if name in STATE_BYTES else None
        cells: list[str] = [
            name,
            f"{row['ms_per_step']:.0f}",
            f"{row['cpu_s_per_step']:.3f}",
            f"{row['ratio_to_floor']:.2f}",
            f"{row['cpu_s_per_step'] / floor_cpu:.2f}",
            f"{setup.tokens / row['ms_per_step'] * 1e3:.0f}",
            f"{row['trainable']}",
            _number(row["peak_bytes_over_base"], 2**20, 1),
            _number(kept, 2**20, 1),
            _number(state, 2**20, 1),
            _number(row["file_bytes"], 1e6, 2),
            _number(row["bytes_per_nonzero"], 1, 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "`floor + dW`: the floor and one dense weight gradient per adapted module, dropped at once. Inputs kept:",
        "activations that weight gradients need and the floor does not. Model: value, gradient, two moments, original",
        "and, for elements and N:M, position of every trained value, plus one layer's weight.",
    ]
    return "\n".join(lines)


def _on(setup: Setup, device: str) -> Setup:
    return Setup(**{**asdict(setup), "device": device})


def _number(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"


if __name__ == "__main__":
    main()
