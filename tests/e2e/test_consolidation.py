"""benchmarks/consolidation.py on a tiny suite, by runs in this process; its tables of results made by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from benchmarks.consolidation import PLAN, WORK, Benchmark, main, work, write
from benchmarks.consolidation_tables import Measured, differences, rows_of, tables
from infra.errors import DataError
from infra.store.s3 import Store
from pipeline.config.candidates import list_candidates
from pipeline.config.model import PipelineConfig, load_config
from pipeline.config.search import plan_rungs
from pipeline.records.results import Results
from tests.e2e import here
from tests.pipeline.report.given import changed, held_in_row

CONFIG = Callable[..., dict[str, Any]]
PARTS = {
    "merge": {"refine": None},
    "3 steps": {"refine": {"steps": [3]}, "yardsticks.multitask": {"steps": 3}},
    "multitask": {"refine": None, "yardsticks.multitask": {}},
}


def plan_of(config: Path) -> dict[str, Any]:
    common = {"config": str(config), "seeds": [0], "floor": 0.01}
    return {
        "candidates": [{"method": "mean"}, {"method": "spectral_power", "params": {"p": -0.5, "lambda": 1}}],
        "evaluations": 4,
        "parts": PARTS,
        "suites": {
            "tiny": common,
            "tiny, 1 task": common | {"tasks": ["in1"]},
            "tiny, next night": common
            | {"after": "tiny", "overrides": {"held_in.in0.sizes.train": 56}, "parts": {"3 steps": PARTS["3 steps"]}},
        },
    }


@pytest.fixture
def benchmark_of(stack: Any, tiny_config: CONFIG, tmp_path: Path) -> tuple[Benchmark, list[Path]]:
    """And the folders of the runs that were made, in their order."""
    config, asked = tmp_path / "config.yaml", list[Path]()
    config.write_text(yaml.safe_dump(tiny_config("consolidating", held_in=2)))

    def pipeline(file: Path, overrides: Sequence[str], out: Path) -> None:
        asked.append(out)
        found = here.run(file, out, *overrides)
        assert found.code == 0, found.output

    return Benchmark(plan_of(config), tmp_path / "out", pipeline), asked


def test_runs_are_made_once_and_compared(
    benchmark_of: tuple[Benchmark, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark, asked = benchmark_of
    merge = benchmark.run("tiny", "merge", 0)
    night = benchmark.run("tiny, next night", "3 steps", 0)
    first = benchmark.run("tiny", "3 steps", 0)
    assert len(asked) == 3, "a report that is there is read"
    assert first.made.experts == 0, "the experts of the run without refining"
    assert first.multitask is not None
    assert first.multitask.rows == first.candidates[-1].refined.rows == 6  # type: ignore[union-attr]
    assert (night.made.experts, night.reused.experts) == (1, 1)
    assert len(night.candidates) == 2, "the merge that won the night before, and it refined"
    seconds = json.loads((benchmark.folder("tiny, next night", "3 steps", 0) / "work.json").read_text())
    assert set(seconds) == {"expert", "merged", "refined", "evaluation", "multitask"}
    assert all(value > 0 for value in seconds.values())
    with pytest.raises(DataError, match="nothing was changed"):
        work(Store.from_env(), merge.run_id, merge.run_id)
    write(benchmark)
    text = (benchmark.out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| **tiny** (seed 0) |" in text
    assert "| | best merge | 0 | 0 % |" in text
    assert "| | base + 3 steps | 6 | 5 % |" in text
    assert "| tiny, next night | 0 | retrain, merge, 3 steps |" in text
    assert (benchmark.out / "consolidation.png").stat().st_size > 10_000


def test_a_run_that_is_asked_otherwise_is_another_one(tmp_path: Path) -> None:
    config, asked = tmp_path / "config.yaml", list[Sequence[str]]()
    config.write_text("held_in: {in0: {source: a}, in1: {source: b}}")

    def pipeline(file: Path, overrides: Sequence[str], out: Path) -> None:
        asked.append(overrides)
        (out / "results.json").write_text(changed().to_json())

    plan = plan_of(config)
    for candidates in (plan["candidates"], plan["candidates"], [{"method": "mean"}]):
        Benchmark({**plan, "candidates": candidates}, tmp_path / "out", pipeline).run("tiny, 1 task", "merge", 0)
    assert len(asked) == 2
    assert 'held_in={"in1": {"source": "b"}}' in asked[0]
    assert "seeds=[0]" in asked[0]
    assert "registers=false" in asked[0]
    assert 'merge.candidates=[{"method": "mean", "params": {}}]' in asked[1]


def test_every_run_of_the_shipped_plan_is_a_configuration(tmp_path: Path) -> None:
    loaded: list[PipelineConfig] = []

    def pipeline(file: Path, overrides: Sequence[str], out: Path) -> None:
        loaded.append(config := load_config(file, list(overrides)))
        listed = list_candidates(config).eligible
        assert plan_rungs(len(listed), len(config.held_in), config.merge.search.evaluations)
        (out / "results.json").write_text(changed().to_json())
        (out / WORK).write_text("{}")

    benchmark = Benchmark(yaml.safe_load(PLAN.read_text()), tmp_path, pipeline)
    for suite, told in benchmark.plan["suites"].items():
        for part in benchmark.parts(suite):
            benchmark.run(suite, part, told["seeds"][0])
    assert {len(config.held_in) for config in loaded} == {2, 5, 10, 20}
    assert {config.expert for config in loaded} == {"sparse", "lora", "full"}
    assert not any(config.registers for config in loaded)
    changed_tasks = [task for config in loaded for task in config.held_in.values() if task.sizes.train == 640]
    assert len(changed_tasks) == len(benchmark.parts("quickstart, next night"))


def test_unknown_names_and_empty_folders_are_told(tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        ended = CliRunner().invoke(main, ["--out", str(tmp_path), *arguments])
        assert ended.exit_code
        return ended.output

    assert "unknown suites ['third']" in said("--suite", "third")
    assert "unknown parts ['5 steps']" in said("--part", "5 steps")
    assert "no reports yet" in said("--only-tables")


def found(part: str, seed: int, merged: Sequence[float], other: Sequence[float], steps: int | None) -> Measured:
    """Two tasks, base 0.2 and experts 0.6; `other`: scores of the steps from the base."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    trained = {"steps": steps, "rows": 2 * (steps or 0), "share": (steps or 0) / 100}
    told = {"key": "k" * 64, "digest": "d" * 64, "uri": "s3://", **trained}
    row = {"method": "mean", "params": {}, "validation": 0.5, "first_rung": 0.5, "interval": [0.4, 0.6], "tasks": 2,
           "rung": 1, "chosen": True}  # fmt: skip
    results: Results = changed(
        held_in={
            f"task_{at}": held_in_row(base=0.2, expert=0.6, merged=score, multitask=second)
            for at, (score, second) in enumerate(zip(merged, other, strict=True))
        },
        summary={"held_in": {"base": 0.2, "expert": 0.6, "merged": mean(merged), "multitask": mean(other)}},
        multitask=told if steps else None,
        chosen={"method": "mean", "params": {}, "refined": trained if steps else None},
        candidates=[row | ({"refined": trained} if steps else {})],
    )
    return Measured("mine", part, seed, results)


def test_differences_are_paired_by_task_and_by_seed() -> None:
    runs = [found("10 steps", 0, (0.4, 0.6), (0.3, 0.3), 10), found("10 steps", 1, (0.6, 0.8), (0.3, 0.5), 10)]
    by_task, by_seed = differences([each.results for each in runs])
    assert by_task == pytest.approx([0.2, 0.3])
    assert by_seed == pytest.approx([0.2, 0.3])
    text = tables([*runs, found("merge", 0, (0.4, 0.4), (0.0, 0.0), None)])
    assert "| mine | 10 steps | +0.250 ± 0.050 | 5.0 | +0.250 ± 0.050 |" in text
    assert "| | best merge + 10 steps | 20 | 10 % | 0.600 ± 0.100 | 100 ± 25 % |" in text
    assert "| | best merge (1 of 2 seeds) | 0 | 0 % | 0.400 | 50 % |" in text


def test_a_refined_merge_that_lost_is_told() -> None:
    lost = found("10 steps", 0, (0.4, 0.6), (0.3, 0.3), 10)
    kept = lost.results.chosen.model_copy(update={"refined": None})
    shown = Measured("mine", "10 steps", 0, lost.results.model_copy(update={"chosen": kept}))
    assert [row.label for row in rows_of([shown])] == [
        "base", "few-shot base", "best merge + 10 steps", "base + 10 steps", "experts",
    ]  # fmt: skip
    assert "in 1 of 1 the merge as it was had the better validation score" in tables([shown])
