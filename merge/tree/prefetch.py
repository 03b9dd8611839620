"""Work done ahead by threads: at most so many results, and about so many bytes, beyond the one in use.

Results come in the order of the jobs, so that whoever joins them gets the same bits with any number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Load(Generic[T]):
    """One job: what to call, and about how many bytes its result holds."""

    run: Callable[[], T]
    size: int


def prefetch(loads: Iterable[Load[T]], depth: int = 2, budget: int = 128 << 20) -> Generator[T]:
    """The loads' results, in order, up to `depth` of them made ahead in as many threads.

    Results that wait hold `budget` bytes at most, but one may always be under way; `depth` 0 makes none ahead. What a
    load raises is raised where its result would come. Leaving the iterator early waits for the loads under way.
    """
    if depth < 1:
        for load in loads:
            yield load.run()
        return
    waiting: deque[tuple[Future[T], int]] = deque()
    source = iter(loads)
    following = next(source, None)

    def fill(pool: ThreadPoolExecutor) -> None:
        nonlocal following
        held = sum(size for _, size in waiting)
        while following is not None and (not waiting or (len(waiting) < depth and held + following.size <= budget)):
            waiting.append((pool.submit(following.run), following.size))
            held += following.size
            following = next(source, None)

    with ThreadPoolExecutor(depth, thread_name_prefix="merge-load") as pool:
        try:
            fill(pool)
            while waiting:
                result = waiting.popleft()[0].result()
                fill(pool)  # the next ones are made while this one is in use
                yield result
                del result
        finally:
            for future, _ in waiting:
                future.cancel()
