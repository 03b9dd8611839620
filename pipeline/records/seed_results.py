"""The section `seeds` of results.json: every score's spread over the seeds of a run."""

from pipeline.records.part import Maybe, Params, Part


class Spread(Part):
    """One score over several seeds."""

    mean: float
    """Mean."""
    sd: float
    """Sample standard deviation."""
    values: tuple[float, ...]
    """The score of each seed, in the order of the seeds."""


class SeedChoice(Part):
    """The merge that one seed chose."""

    method: str
    """Merge method."""
    params: Params
    """All its parameters, defaults included."""
    refined: Maybe[int] = None
    """Steps that it was trained on after merging; left out for a merge as it is."""


class SeedSummary(Part):
    """Means over tasks, by name, over the seeds."""

    held_in: dict[str, Spread]
    """Of the tasks with an expert."""
    held_out: dict[str, Spread]
    """Of the tasks without."""


class SeedTasks(Part):
    """Scores by task and model, over the seeds."""

    held_in: dict[str, dict[str, Spread]]
    """Of the tasks with an expert."""
    held_out: dict[str, dict[str, Spread]]
    """Of the tasks without."""


class Seeds(Part):
    """What a run of several seeds adds."""

    values: tuple[int, ...]
    """The seeds."""
    chosen: tuple[SeedChoice, ...]
    """The merge that each seed chose."""
    summary: SeedSummary
    """Spread of the means over tasks."""
    tasks: SeedTasks
    """Spread of every task's scores."""
