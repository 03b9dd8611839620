"""Runs the merging benchmark's cases in interleaved rounds, with the object store where a case needs it.

Does not cover what a run records (`benchmarks.merging_measure`) and how it is shown (`benchmarks.merging_tables`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.merging_cases import CASES, STORED_EXPERTS, Setup
from benchmarks.merging_inputs import Inputs
from benchmarks.merging_measure import Server, Usage, copy_seconds, local_s3, run_process, settle
from infra.store.s3 import FileRef, Store
from workers.tensors.checkpoint import WEIGHTS


@dataclass(frozen=True)
class Rounds:
    """`counted`: runs of each case by round, inputs in memory. `cold`: one run each with the inputs out of memory, and
    `copied`, the seconds of a plain copy of as many bytes after it. Cases in the object store are in `counted` only."""

    counted: dict[str, list[Usage]] = field(default_factory=dict)
    cold: dict[str, Usage] = field(default_factory=dict)
    copied: dict[str, float] = field(default_factory=dict)

    def median(self, name: str, value: Callable[[Usage], float]) -> float:
        return statistics.median(map(value, self.counted[name]))

    def ratio(self, name: str, other: str, value: Callable[[Usage], float]) -> float:
        """Median over the rounds of `name`'s value ÷ `other`'s in the same round."""
        pairs = zip(self.counted[name], self.counted[other], strict=True)
        return statistics.median(value(mine) / value(theirs) for mine, theirs in pairs)


def run_rounds(names: Sequence[str], setup: Setup, rounds: int, work: Path, say: Callable[[str], None]) -> Rounds:
    """Every case once per round, those in the store last, on a fresh store per round."""
    found = Rounds()
    Path(setup.outputs).mkdir(parents=True, exist_ok=True)
    local = [name for name in names if CASES[name].reads != "store"]
    stored = [name for name in names if CASES[name].reads == "store"]
    for number in range(rounds + 1):
        for name in local:
            if number == 0:
                found.cold[name] = _run_cold(name, setup, work, found.copied)
            else:
                settle(_reads(name, setup), cold=False)
                found.counted.setdefault(name, []).append(_run(name, setup, work))
            say(f"round {number} of {rounds}: {name} {_seconds(found, name, number)}")
        if stored and number > 0:
            with local_s3(work / "s3") as server:
                _upload(server.store(), setup, work / "experts.json")
                for name in stored:
                    os.sync()
                    found.counted.setdefault(name, []).append(_run(name, setup, work, server))
                    say(f"round {number} of {rounds}: {name} {_seconds(found, name, number)}")
    return found


def _seconds(found: Rounds, name: str, number: int) -> str:
    usage = found.counted[name][-1] if number else found.cold[name]
    return f"{usage.merge.wall_s:.1f} s" + ("" if number else " (not counted)")


def _run(name: str, setup: Setup, work: Path, server: Server | None = None) -> Usage:
    path, result = work / "setup.json", work / "result.json"
    path.write_text(json.dumps(asdict(setup)))
    out = setup.out(name)  # of the round before
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    env: Mapping[str, str] = {}
    if server is not None:
        env = {**server.env, STORED_EXPERTS: str(work / "experts.json")}
    arguments = [name, str(path), str(result)]
    return run_process(
        "benchmarks.merging_cases", arguments, setup.threads, env, result, server.pid if server else None
    )


def _run_cold(name: str, setup: Setup, work: Path, copied: dict[str, float]) -> Usage:
    reads = _reads(name, setup)
    settle(reads, cold=True)
    usage = _run(name, setup, work)
    if name.startswith("ours_"):
        settle(reads, cold=True)
        copied[name] = copy_seconds(reads, work / "copy", usage.merge.written)
    return usage


def _reads(name: str, setup: Setup) -> list[Path]:
    """The local files that a case reads."""
    if CASES[name].reads == "adapters":
        return list(setup.adapters().values())
    checkpoints = [*setup.checkpoints().values(), *([] if "linear" in name else [setup.base()])]
    return [folder / WEIGHTS for folder in checkpoints]


def _upload(store: Store, setup: Setup, note: Path) -> None:
    """Base and adapters as the pipeline stores them; where they are goes to `note`, for the cases."""
    inputs = Inputs(Path(setup.folder), setup.modules)
    refs: dict[str, Any] = {"base": asdict(store.upload_file("bases/weights.safetensors", inputs.base_bfloat16))}
    for name, path in {**setup.adapters(), "changed": inputs.changed()}.items():
        ref: FileRef = store.upload_file(f"experts/{name}", path)
        refs[name] = {**asdict(ref), "key": hashlib.sha256(f"expert {ref.sha256}".encode()).hexdigest()}
    note.write_text(json.dumps(refs))
