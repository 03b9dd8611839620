"""Runs of prepared inputs in this process: what a test asks that wants the engine and its manifests, and no report."""

import asyncio

from rich.console import Console

from infra.engine.keyed import KeyedEngine
from pipeline.flow.context import Flow
from pipeline.flow.run import run
from pipeline.records.outcome import Inputs, Outcome
from pipeline.report.display import Display
from pipeline.running.in_process import Here


def made_here(inputs: Inputs) -> tuple[KeyedEngine, Outcome]:
    """A run by the workers of `run_here`, who load one model at a time; the engine's tally says what was made."""

    async def work() -> KeyedEngine:
        workers = Here(inputs, lambda subject, what: None)
        engine = KeyedEngine(inputs.store, workers)
        try:
            await engine.run(run(Flow(inputs, engine, outcome, display, lambda keys: None)))
        finally:
            workers.close()
            engine.close()
        return engine

    outcome, display = Outcome(), Display(list(inputs.config.held_in), Console(quiet=True))
    return asyncio.run(work()), outcome
