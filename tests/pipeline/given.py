"""Inputs of runs that exist only in memory: tasks of nine rows and a base that nobody loads."""

from pathlib import Path
from typing import Any

from infra.store.s3 import Store
from pipeline.config.candidates import list_candidates
from pipeline.config.model import PipelineConfig
from pipeline.data.tasks import SPLITS, TaskConfig, TaskData
from pipeline.records.outcome import Inputs
from workers.base.prepare import PreparedBase
from workers.text.prompt import DEFAULT_WRAPPER
from workers.text.rows import Row, fingerprint

TASK = {"source": "jsonl:rows.jsonl", "metric": "exact_match"}
CANDIDATES: list[dict[str, Any]] = [
    {"method": "mean"},
    {"method": "ties", "params": {"lambda": [0.5, 1.0], "density": [0.5, 1.0]}},
    {"method": "weighted_mean", "weights": "training_rows"},
    {"method": "sce"},
    {"method": "consensus"},
    {"method": "fisher_on_support"},
    {"method": "regmean"},
    {"method": "emr"},
    {"method": "tall"},
]


def inputs(store: Store, tasks: int = 6, registers: bool = True, **sections: Any) -> Inputs:
    given = {
        "suite": "mine",
        "base": "path:/nowhere",
        "prompt": {"wrapper": DEFAULT_WRAPPER},
        "held_in": {f"task{number}": TASK for number in range(tasks)},
        "held_out": {"other": TASK},
        "train": {"steps": 3},
        "merge": {"fan_in": 2, "candidates": CANDIDATES},
    }
    config = PipelineConfig.model_validate(given | sections)
    data = {}
    for name in [*config.scored, *config.kept]:
        rows = tuple(Row(str(at), f"{name} {at}", ("yes" if at % 2 else "no",)) for at in range(9))
        splits = {split: rows for split in SPLITS}
        data[name] = TaskData(name, TaskConfig(**TASK), splits, {split: fingerprint(rows) for split in SPLITS})
    listed = list_candidates(config, {name: 9 for name in config.held_in})
    base = PreparedBase(Path("/nowhere"), "tiny", "b" * 64, "none")
    return Inputs(config, store, base, "bases/x", data, dict.fromkeys(data, 4), listed, "run", registers=registers)
