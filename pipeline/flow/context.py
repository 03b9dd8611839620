"""What every part of a run's flow is handed: inputs, engine, what the run has come to, and whom to tell."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from infra.artifacts.manifests import Manifest
from infra.engine.once import Failed, Once
from infra.engine.step import Engine, Step
from infra.errors import FactoryError
from pipeline.records.outcome import Inputs, Outcome
from pipeline.report.display import Display


@dataclass(frozen=True)
class Flow:
    """One run of one seed."""

    inputs: Inputs
    engine: Engine
    outcome: Outcome
    display: Display
    announce: Callable[[Collection[str]], None]
    """Told keys that could not be known before the run, before they are looked for."""
    rehearsed: bool = False
    """Whether nobody will read what is registered: then no cards are written."""
    once: Once = field(default_factory=Once)
    problems: dict[str, None] = field(default_factory=dict)
    """What failed, in words and in order, of everything but experts."""
    errors: list[Exception] = field(default_factory=list)
    """Why anything failed."""

    def on(self, engine: Engine) -> "Flow":
        """The same flow on one way that it may take: with an outcome of its own, where there are several."""
        if engine is self.engine:
            return self
        return replace(self, engine=engine, outcome=self.outcome.copy(), once=self.once.copy())

    def failed(self, what: str, error: Exception) -> Failed:
        """Note why something failed, once; the run goes on with everything that does not depend on it."""
        if isinstance(error, Failed):
            return error
        text = f"{what} failed: {reason(error)}"
        if text not in self.problems:
            self.problems[text] = None
            self.errors.append(error)
            self.display.line(text)
        return Failed(text)

    async def make(self, step: Step, what: str) -> tuple[Manifest, bool]:
        """The artifact of a step without which the run fails, and whether it was made now. Raises Failed."""
        try:
            ((manifest, made),) = await self.engine.make(step)
        except Exception as error:
            raise self.failed(what, error) from error
        return manifest, made

    async def need(self, step: Step, what: str) -> Manifest:
        """The artifact alone."""
        return (await self.make(step, what))[0]


def reason(error: Exception) -> str:
    """Why work failed, in one line: the message of a FactoryError as it is, anything else with its type."""
    if isinstance(error, FactoryError):
        return str(error)
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[-1]}"
