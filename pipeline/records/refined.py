"""A merge that was trained on: named beside the merges that it competes with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.methods.parameters import Params
from merge.methods.specs import Candidate


@dataclass(frozen=True)
class Refined:
    """A merge candidate after so many further steps on rows of all held-in tasks. Hashable."""

    start: Candidate
    steps: int

    @property
    def method(self) -> str:
        """Of the merge that it started from, as the following."""
        return self.start.method

    @property
    def params(self) -> Params:
        return self.start.params

    @property
    def weights(self) -> Mapping[str, float] | None:
        return self.start.weights

    def to_dict(self) -> dict[str, Any]:
        """The merge's, and "refined"."""
        return self.start.to_dict() | {"refined": {"steps": self.steps}}

    def to_json(self) -> str:
        """Canonical JSON: equal for equal ones, and no merge's."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def __str__(self) -> str:
        return f"{self.start} + {self.steps} steps"


Merge = Candidate | Refined
"""What may be chosen."""
