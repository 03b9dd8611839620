"""What a run made and what it found, by kind, for results and plans."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """`at_most`: kinds of which fewer may be made and more be found. Only a rehearsal does not know."""

    made: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    at_most: set[str] = field(default_factory=set)
    spans: defaultdict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """When work that made something began and ended, in seconds since the epoch."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of work that made something, by what the work itself says."""

    def add_step(self, kind: str, each: str, new: Sequence[bool]) -> None:
        """A step of this kind; `new`: which of its artifacts are made, each of which is counted as `each` besides."""
        made = sum(new)
        self.add(kind, int(made > 0), int(made == 0))
        if each:
            self.add(each, made, len(new) - made)

    def add(self, kind: str, made: int, reused: int) -> None:
        """So many more of a kind."""
        self.made[kind] += made
        self.reused[kind] += reused
