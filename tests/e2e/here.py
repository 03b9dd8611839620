"""Runs and commands of `python -m pipeline` in this process: what they find and make is real, who works is threads.

What a cluster would send is sent all the same: work, answers and errors are pickled on the way.

    python -m tests.e2e.here CONFIG REPORT
"""

import contextlib
import io
import json
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ray import cloudpickle
from rich.console import Console

from infra.artifacts.claims import Busy, Claim
from infra.engine.step import Answer, Query, Step
from pipeline.__main__ import main
from pipeline.plan.preflight import Prepared
from pipeline.records.outcome import Inputs
from pipeline.running.driver import Site
from pipeline.running.execute import Crew, Hear
from pipeline.running.in_process import ThisProcess, run_here
from pipeline.running.signals import Handler

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """A command that ended; `results` is what a run reported."""

    code: int
    output: str
    results: dict[str, Any] | None


def command(*arguments: str) -> Finished:
    """Exit status and output of `python -m pipeline …`. For one thread of this process at a time."""
    output = io.StringIO()
    code = 1
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main.main(args=list(arguments), prog_name="python -m pipeline")
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception:
            traceback.print_exc()
    return Finished(code, output.getvalue(), None)


def run(file: Path, report: Path, *overrides: str) -> Finished:
    """A run of a configuration."""
    text, written = io.StringIO(), report / "results.json"
    written.unlink(missing_ok=True)
    console = Console(file=text, soft_wrap=True, width=120)
    code = run_here(file, *overrides, report=report, site=Apart(), console=console)
    return Finished(code, text.getvalue(), json.loads(written.read_text()) if written.is_file() else None)


@dataclass(frozen=True)
class Apart:
    """A site whose crew shares no object with the flow, as processes would not."""

    site: Site = field(default_factory=ThisProcess)

    def check(self) -> None:
        self.site.check()

    def join(self, prepared: Prepared, console: Console) -> int:
        return self.site.join(prepared, console)

    def hire(self, inputs: Inputs, hear: Hear) -> Crew:
        return Sent(self.site.hire(replace(inputs, store=pickle.loads(pickle.dumps(inputs.store))), hear))

    def heeding(self, handler: Handler) -> contextlib.AbstractContextManager[None]:
        return self.site.heeding(handler)


@dataclass(frozen=True)
class Sent:
    """A crew to which everything goes, and from which everything comes, as bytes."""

    crew: Crew

    async def run(self, step: Step, claim: Claim) -> Answer | Busy:
        with errors_sent():
            answer = await self.crew.run(replace(step, call=sent(step.call)), sent(claim))
        return sent(answer)

    async def ask(self, query: Query[T]) -> T:
        with errors_sent():
            answer = await self.crew.ask(sent(query))
        return sent(answer)

    async def serve(self) -> None:
        await self.crew.serve()

    def close(self) -> None:
        self.crew.close()


def sent(what: T) -> T:
    """What arrives in another process, with Ray's pickle."""
    arrived: T = cloudpickle.loads(cloudpickle.dumps(what))
    return arrived


@contextlib.contextmanager
def errors_sent() -> Iterator[None]:
    """An error arrives without what caused it."""
    try:
        yield
    except Exception as error:
        raise sent(error) from None


Pipeline = Callable[..., Finished]
"""Of the fixture `pipeline`."""


if __name__ == "__main__":
    sys.exit(run_here(sys.argv[1], report=Path(sys.argv[2]), site=Apart()))
