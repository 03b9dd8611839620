"""The section of results.json about rows: what was dropped, joined or cut of each task before anything was trained."""

from pipeline.records.part import Part


class CutRows(Part):
    """Rows of a task that a length limit cuts."""

    rows: int
    """Rows of which something is cut."""
    inputs: int
    """Inputs that lose their beginning."""
    instructions: int
    """Of those, inputs that lose what the task's inputs begin with."""
    targets: int
    """Targets that lose their end."""


class TaskRows(Part):
    """Rows of one task, as they were read and as they are used."""

    read: int
    """Rows of the source."""
    kept: int
    """Rows that are left, before they are cut to the sizes of the splits."""
    joined: int
    """Rows that say again what another one says, or give another free answer to its input."""
    several_answers: int
    """Kept rows that are joined of rows with different free answers."""
    alike: int
    """Kept rows that differ from another one in case, whitespace or options only."""
    dropped: dict[str, int]
    """Rows whose answer is in no split, by reason."""
    dropped_share: float
    """Their share of the rows that were read."""
    used: int
    """Rows in splits."""
    cut: CutRows
    """Of the rows in splits."""
    cut_share: float
    """Share of the rows in splits of which something is cut."""
    text: str
    """The same in a sentence; empty if all rows are as they were read."""
