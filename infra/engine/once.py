"""Helpers for flows: something is done once however often it is awaited, and several things go on when one fails."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Failed(Exception):
    """What depends on something that failed, and cannot go on; why it failed has been noted."""


class Once:
    """Coroutines by name. Each is started when it is first asked for; who asks later awaits the same one."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}

    def copy(self) -> "Once":
        """What was started before is shared; what is started from now on is not."""
        copied = Once()
        copied._tasks = dict(self._tasks)
        return copied

    def __call__(self, name: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> "asyncio.Task[T]":
        """The task of that name."""
        task = self._tasks.get(name)
        if task is None:
            task = asyncio.get_running_loop().create_task(start())
            task.add_done_callback(_noticed)
            self._tasks[name] = task
        return task


def _noticed(task: "asyncio.Task[Any]") -> None:
    """Who awaits a task hears of its failure; asyncio need not say that nobody did."""
    if not task.cancelled():
        task.exception()


async def every(*parts: Awaitable[T]) -> list[T]:
    """The results of all parts, in their order. All come to their end before a failure is raised, so that what does not
    depend on it is done; `Failed` is raised last, since another one has not been noted yet."""
    results = await asyncio.gather(*parts, return_exceptions=True)
    failures = [each for each in results if isinstance(each, BaseException)]
    for failure in sorted(failures, key=lambda each: isinstance(each, Failed)):
        raise failure
    return [each for each in results if not isinstance(each, BaseException)]
