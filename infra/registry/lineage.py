"""What a registered merge was made of: its experts' registered versions, the method, its parameters, the keys.

MLflow's tags are short text, so a version carries a shortened form as tags and in its description, and the whole as
``lineage.json`` beside the model's files. Finding and storing versions is `infra.registry.models`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LINEAGE_FILE = "lineage.json"
KEY_TAG = "factory.lineage.key"
"""Tag of a version: the recipe of the merged adapter."""
TAG_LENGTH = 5000
"""Longest tag value that every MLflow server takes (newer ones take more)."""
_TEXT_LENGTH = 1000


@dataclass(frozen=True)
class Ancestor:
    """One expert of a merge. ``version``: ``models:/<name>/<version>``, None where it is not registered."""

    name: str
    key: str
    digest: str
    version: str | None = None

    def __str__(self) -> str:
        return self.version or f"{self.name} (not registered)"


@dataclass(frozen=True)
class Lineage:
    """How a merge came about. ``parameters`` are the method's, expert weights among them, as plain JSON values;
    ``key`` is the recipe of the merged adapter; ``experts`` are in the order in which they are to be listed."""

    method: str
    parameters: Mapping[str, Any]
    key: str
    experts: tuple[Ancestor, ...]

    def to_json(self) -> str:
        """The whole lineage, canonical."""
        whole = {
            "method": self.method,
            "parameters": dict(self.parameters),
            "key": self.key,
            "experts": [asdict(expert) for expert in self.experts],
        }
        return json.dumps(whole, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Lineage":
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        body = json.loads(text)
        return cls(body["method"], body["parameters"], body["key"], tuple(Ancestor(**each) for each in body["experts"]))

    def tags(self) -> dict[str, str]:
        """Tags of a model version, none longer than ``TAG_LENGTH``."""
        return {
            "factory.lineage.method": self.method,
            "factory.lineage.parameters": self._parameters(TAG_LENGTH),
            KEY_TAG: self.key,
            "factory.lineage.experts": self._experts(TAG_LENGTH),
        }

    def text(self) -> str:
        """Lines for a description, 2200 characters at most."""
        parameters = self._parameters(_TEXT_LENGTH)
        return (
            f"- method: {self.method}{' with ' + parameters if self.parameters else ''}, recipe {self.key}\n"
            f"- made of {len(self.experts)} experts: {self._experts(_TEXT_LENGTH)}"
        )

    def _parameters(self, length: int) -> str:
        text = json.dumps(dict(self.parameters), sort_keys=True)
        return text if len(text) <= length else f"too many to list here: see {LINEAGE_FILE}"

    def _experts(self, length: int) -> str:
        """As many experts as fit, and how many more there are."""
        words = [str(expert) for expert in self.experts]
        text = ", ".join(words)
        while len(text) > length:
            words = words[: len(words) * length // (len(text) + 1)]
            text = ", ".join([*words, f"and {len(self.experts) - len(words)} more: see {LINEAGE_FILE}"])
        return text
