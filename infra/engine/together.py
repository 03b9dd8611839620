"""Requests that flows make at the same time, sent together: a run asks for thousands."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from infra.engine.in_thread import in_thread

A = TypeVar("A")
B = TypeVar("B")


class Together(Generic[A, B]):
    """Who asks while a call is under way is served by the next one; who asked first goes on first."""

    def __init__(self, answer: Callable[[Sequence[A]], Sequence[B]]) -> None:
        """`answer`: a blocking call that gives an answer for each question, in their order."""
        self._answer = answer
        self._asked: list[tuple[Sequence[A], asyncio.Future[list[B]]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self, questions: Iterable[A]) -> list[B]:
        """The answers, in the order of the questions. Raises what the call raised."""
        future: asyncio.Future[list[B]] = asyncio.get_running_loop().create_future()
        self._asked.append((list(questions), future))
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
        return await future

    async def _ask(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, []
            try:
                answers = iter(await in_thread(self._answer, [each for questions, _ in asked for each in questions]))
            except Exception as error:
                for _, future in asked:
                    if not future.done():
                        future.set_exception(error)
                continue
            for questions, future in asked:
                own = [next(answers) for _ in questions]
                if not future.done():
                    future.set_result(own)
        self._asking = None
