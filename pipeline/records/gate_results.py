"""The section `gate` of results.json: which registered versions became champion, and why others did not."""

from pipeline.records.part import Interval, Part


class Pair(Part):
    """Two scores on the same gate rows."""

    opponent: float
    """Of the champion, or of the base where there is none."""
    challenger: float
    """Of the version that this run registered."""


class VersionRow(Part):
    """What became of a registered version."""

    name: str
    """The registered model's name."""
    version: int
    """Number of the version that holds what this run made or found."""
    promoted: bool
    """Whether the version became champion in this run."""
    champion: int | None
    """The version that is champion after the run; null: none."""
    reason: str
    """Why, in a sentence."""
    opponent: str | None
    """What the version was compared with in this run; null: with nothing, as the fields below."""
    difference: float | None
    """Mean score of the challenger less that of the opponent."""
    interval: Interval | None
    """Interval of the difference, at the gate's confidence."""
    scores: Pair | None
    """Mean scores over the tasks."""
    tasks: dict[str, Pair]
    """Scores by task."""


class Gate(Part):
    """Which registered versions became champion, and by which rule."""

    rule: str
    """`superior` or `not_worse`."""
    margin: float
    """Difference of mean scores that matters."""
    confidence: float
    """Of the interval of the difference."""
    models: dict[str, VersionRow]
    """By task, then `merged` and `merged-checkpoint`; empty where a run registers nothing."""
