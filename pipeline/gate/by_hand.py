"""`python -m pipeline models | promote | rollback`: the registered models of a suite, and who is champion, by hand.

A full checkpoint follows its merge. Exit status: 0, or 2 for bad input and services that do not answer.
"""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.ending import message
from infra.errors import ConfigError, FactoryError, RegistryError
from infra.registry import aliases, runs, versions
from infra.registry.runs import CHECKPOINT, MERGED, model_name
from infra.registry.versions import (
    BY_HAND,
    CHALLENGER,
    CHAMPION,
    DECISION,
    OPPONENT,
    PREVIOUS,
    REASON,
    ROLLED_BACK,
    Model,
    Version,
)
from infra.store.s3 import Store


def models(suite: str, task: str | None) -> None:
    """The registered models of SUITE: champions, challengers, and why they are that."""
    console = _console()

    def show() -> None:
        found = _models(suite)
        if task is None:
            console.print(_overview(found))
            return
        for model in found:
            if model.task == task:
                console.print(_versions(model))
                return
        raise ConfigError(f"no model of {task!r} in {suite!r}; there are: {', '.join(model.task for model in found)}")

    _guarded(console, show)


def promote(suite: str, version: int, task: str, reason: str) -> None:
    """Make a version of SUITE's merge, or of a task's expert, the champion, whatever the gate said."""
    console = _console()

    def change() -> None:
        store, name = _model(suite, task)
        chosen = versions.find_version(name, version)
        if chosen is None:
            raise ConfigError(f"there is no version {version} of {name!r}; see: python -m pipeline models {suite}")
        if (uri := versions.gone(store, chosen)) is not None:
            raise ConfigError(f"version {version} of {name!r}: {uri} is gone, so it cannot serve")
        before = aliases.promote(store, name, version, reason)
        if before is not None and before.version == version:
            console.print(f"{name}: version {version} is champion already", markup=False)
        else:
            after = f", after version {before.version}" if before else ""
            console.print(f"{name}: version {version} is champion{after}", markup=False)
        _follow(console, store, suite, task, strict=False)

    _guarded(console, change)


def rollback(suite: str, version: int | None, task: str, reason: str) -> None:
    """Make the former champion of SUITE's merge, or of a task's expert, champion again.

    No gate promotes the same bytes again. Called twice it goes back twice, but not with --version.
    """
    console = _console()

    def change() -> None:
        store, name = _model(suite, task)
        leads = versions.champion(name)
        goes = version or (leads.version if leads else None)
        try:
            former, present = aliases.rollback(store, name, reason, goes)
            console.print(
                f"{name}: version {former.version} is champion again; version {present.version} is rolled back, and "
                "no gate promotes its bytes again",
                markup=False,
            )
            _follow(console, store, suite, task, strict=True)
        except FactoryError as error:
            if goes is None or not _has_gone(name, goes):
                raise
            option = "" if task == MERGED else f" --task {task}"
            again = f"python -m pipeline rollback {suite} --version {goes}{option}"
            raise RegistryError(f"{error}\nto go on, and take no other version away: {again}") from error

    _guarded(console, change)


def _has_gone(name: str, version: int) -> bool:
    """Whether the champion of a model may have just been rolled back from this version to the one before."""
    try:
        found, now = versions.find_version(name, version), versions.champion(name)
    except FactoryError:
        return True
    if found is None or now is None:
        return False
    return ROLLED_BACK in found.tags and found.tags.get(PREVIOUS) == str(now.version)


def _follow(console: Console, store: Store, suite: str, task: str, strict: bool) -> None:
    """Let the full checkpoint follow the merge."""
    if task != MERGED:
        return
    leader, follower = model_name(suite, MERGED), model_name(suite, CHECKPOINT)
    before = versions.champion(follower)
    now = aliases.follow(store, leader, follower, strict=strict)
    if now is not None:
        console.print(f"{follower}: version {now} is champion", markup=False)
    elif before is not None:
        state = "there is no champion any more" if strict else f"version {before.version} stays champion"
        console.print(f"{follower}: no version was made of this merge, so {state}", markup=False)


def _model(suite: str, task: str) -> tuple[Store, str]:
    """The store and the registered name. Raises ConfigError, StoreError or RegistryError."""
    if task == CHECKPOINT:
        raise ConfigError(f"the full checkpoint follows the merge: leave out --task {CHECKPOINT}")
    name = runs.model_names(suite, [task])[task]
    store = Store.from_env()
    store.check()
    runs.check()
    return store, name


def _models(suite: str) -> list[Model]:
    runs.model_names(suite, [MERGED])
    runs.check()
    if found := versions.models_of(suite):
        return found
    raise ConfigError(f"there are no registered models of a suite {suite!r}")


# -- showing -----------------------------------------------------------------------------------------------------


def _overview(found: list[Model]) -> Table:
    """A row for each model: its champion, its challenger and why that one is none."""
    table = Table("model", "versions", "champion", "challenger", "why", box=None)
    for model in found:
        numbers = {version.version: version for version in model.versions}
        champion, challenger = (model.aliases.get(alias) for alias in (CHAMPION, CHALLENGER))
        shown = numbers.get(challenger or champion or 0)
        cells = [model.name, len(numbers), champion or "", challenger or "", _why(shown) if shown else ""]
        table.add_row(*(Text(str(cell)) for cell in cells))
    return table


def _versions(model: Model) -> Table:
    """A row for each version of a model."""
    table = Table("version", "registered", "aliases", "gate", "against", "why", title=model.name, box=None)
    for version in model.versions:
        named = ", ".join(alias for alias, number in model.aliases.items() if number == version.version)
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(version.created))
        tags = version.tags
        cells = [version.version, made, named, tags.get(DECISION, ""), tags.get(OPPONENT, ""), _why(version)]
        table.add_row(*(Text(str(cell)) for cell in cells))
    return table


def _why(version: Version) -> str:
    """What was recorded with a version, the latest first."""
    tags = version.tags
    said = [
        f"rolled back {tags[ROLLED_BACK]}" if ROLLED_BACK in tags else "",
        f"by hand {tags[BY_HAND]}" if BY_HAND in tags else "",
        tags.get(REASON, ""),
    ]
    return "; ".join(filter(None, said))


def _console() -> Console:
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200, highlight=False)


def _guarded(console: Console, work: Callable[[], None]) -> None:
    """Do it; an error is a message and exit status 2."""
    try:
        work()
    except Exception as error:
        console.print(f"error: {message(error)}", style="bold red", markup=False)
        sys.exit(2)
