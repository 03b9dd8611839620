"""Running in this process: who is asked to work, and how it ends. Whole runs are in tests/e2e."""

import asyncio
import io
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from infra.artifacts.claims import Claim
from infra.engine.step import Answer, Made, Needs, Place, Pool, Step
from infra.store.s3 import Store
from pipeline.config.model import PipelineConfig
from pipeline.plan.preflight import Prepared
from pipeline.running import in_process
from pipeline.running.in_process import Here, ThisProcess, run_here


def inputs(store: Store, **resources: Any) -> Any:
    config = PipelineConfig.model_validate(
        {
            "suite": "s",
            "base": "path:/nowhere",
            "held_in": {"in0": {"source": "jsonl:/nowhere", "metric": "exact_match"}},
            "train": {"steps": 1},
            "merge": {"candidates": [{"method": "mean"}]},
            "resources": resources,
        }
    )
    return SimpleNamespace(store=store, config=config)


def step(pool: Pool, call: Any) -> Step:
    return Step("experts", "a step", (), {}, call, Needs(pool), "file")


def test_one_piece_of_work_at_a_time_whatever_it_is(store: Store) -> None:
    """Loading a model changes what holds for the whole process."""
    guard, running, seen = threading.Lock(), [0], [0]

    def work(store: Store, place: Place) -> Made:
        with guard:
            running[0] += 1
            seen.append(running[0])
        time.sleep(0.01)  # for one too many to come
        with guard:
            running[0] -= 1
        return ()

    async def flow() -> None:
        crew = Here(inputs(store, concurrent_nodes=3), lambda subject, what: None)
        pools: list[Pool] = ["expert", "evaluator", "node"] * 3
        await asyncio.gather(*(crew.run(step(pool, work), Claim((), {})) for pool in pools))
        crew.close()

    asyncio.run(flow())
    assert seen == [0] + [1] * 9


def test_progress_is_heard_in_the_loop_and_threads_are_as_many_as_cpus(store: Store) -> None:
    heard: list[tuple[str, int]] = []

    def work(store: Store, place: Place) -> Made:
        place.report("in0", place.threads)
        return ()

    async def flow() -> None:
        loop_thread = threading.get_ident()

        def hear(subject: str, what: int) -> None:
            assert threading.get_ident() == loop_thread
            heard.append((subject, what))

        crew = Here(inputs(store, expert={"cpus": 2.5}), hear)
        assert isinstance(await crew.run(step("expert", work), Claim((), {})), Answer)

    asyncio.run(flow())
    assert heard == [("in0", 2)]


def test_a_training_ends_with_its_step_when_the_run_is_over(store: Store) -> None:
    began, ended, steps = threading.Event(), threading.Event(), [0]

    def train(store: Store, place: Place) -> Made:
        try:
            for _ in range(100_000):
                place.report("in0", steps[0])
                steps[0] += 1
                began.set()
                time.sleep(0.001)
        finally:
            ended.set()
        return ()

    def waiting(store: Store, place: Place) -> Made:
        raise AssertionError("it must not start any more")

    async def flow() -> None:
        crew = Here(inputs(store), lambda subject, what: None)
        tasks = [asyncio.ensure_future(crew.run(step("expert", call), Claim((), {}))) for call in (train, waiting)]
        while not began.is_set():
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        crew.close()
        assert ended.is_set()
        assert steps[0] < 100_000

    asyncio.run(flow())


def test_one_slot_of_a_machine_that_is_large_enough() -> None:
    asked: list[Any] = []
    prepared = SimpleNamespace(check_cluster=lambda nodes, console: asked.append(nodes) or 64)
    assert ThisProcess().join(cast(Prepared, prepared), Console(quiet=True)) == 1
    ((node,),) = asked
    assert node["Alive"]
    assert node["Resources"]["CPU"] >= 1
    assert node["Resources"]["memory"] > 1 << 30


def test_a_refused_run_where_a_loop_runs_already() -> None:
    async def notebook() -> int:
        return run_here("/no/such/file.yaml", console=Console(file=io.StringIO()))

    assert asyncio.run(notebook()) == 2


def test_ctrl_c_stops_the_run_and_torch_keeps_its_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, main, waits, result = torch.get_num_threads(), threading.get_ident(), threading.Event(), Future.result

    def waiting(future: Future[int]) -> int:
        waits.set()
        return result(future)

    def drive(
        config: str, report: Path | None, overrides: tuple[str, ...], site: Any, stop: threading.Event, console: Console
    ) -> int:
        assert (config, report, overrides) == ("c.yaml", tmp_path, ("a=1", "b=2"))
        torch.set_num_threads(before + 1)
        assert waits.wait(30)
        signal.pthread_kill(main, signal.SIGINT)
        assert stop.wait(30)
        return 130

    monkeypatch.setattr(in_process, "drive", drive)
    monkeypatch.setattr(Future, "result", waiting)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_here("c.yaml", "a=1", "b=2", report=tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert torch.get_num_threads() == before
