"""The sections of results.json about merges: which were tried, how one was chosen, and what it is."""

from pipeline.records.part import Interval, Maybe, Params, Part


class RefinedRow(Part):
    """How a merge was trained on, on rows of all held-in tasks."""

    steps: int
    """Optimizer steps."""
    rows: int
    """Training rows that they saw beyond the experts', rows that came again counted again."""
    share: float
    """Those rows as a share of the training rows that all experts together saw."""


class RoundsRow(Part):
    """In how many rounds the experts were trained, and how those of one were merged for the next."""

    count: int
    """Rounds."""
    support: str
    """Which positions were changed in later rounds: `fresh` or `kept`."""
    method: str
    """Merge method between rounds."""
    params: Params
    """All its parameters, defaults included."""
    weights: Maybe[dict[str, float]] = None
    """Weight of each expert; left out for a merge without weights."""


class CandidateRow(Part):
    """A merge that was tried and could be chosen."""

    method: str
    """Merge method."""
    params: Params
    """All its parameters, defaults included."""
    weights: Maybe[dict[str, float]] = None
    """Weight of each expert; left out for a merge without weights."""
    validation: float
    """Mean validation score over the tasks that the candidate was scored on."""
    interval: Interval
    """Interval of `validation`."""
    first_rung: float
    """Mean validation score over the tasks that every candidate was scored on."""
    tasks: int
    """Tasks that the candidate was scored on."""
    rung: int
    """Last rung of the search that the candidate was in, from 1. Refined merges come after the search: one more than
    it has."""
    chosen: bool
    """Whether this is the merge that the run reports and registers."""
    refined: Maybe[RefinedRow] = None
    """How it was trained on after the merge that the other fields name; left out for merges as they are."""
    by_task: Maybe[dict[str, float]] = None
    """Validation score by task; of refined merges and of those that they started from, where these were scored on
    every task."""


class RungRow(Part):
    """One rung of the search."""

    candidates: int
    """Candidates that were still in."""
    tasks: int
    """Further tasks that they were scored on."""


class Search(Part):
    """How the merge was chosen."""

    budget: int | None
    """Most validation scores that the search was allowed; null: no limit."""
    evaluations: int
    """Validation scores that it took; those of refined merges, each on every task, are not among them."""
    rungs: tuple[RungRow, ...]
    """Its rungs, in order."""


class PerTaskRow(Part):
    """A merge that has to know the task at inference: reported apart, never chosen."""

    method: str
    """Merge method."""
    params: Params
    """All its parameters, defaults included."""
    weights: Maybe[dict[str, float]] = None
    """Weight of each expert; left out for a merge without weights."""
    validation: float
    """Mean validation score over all held-in tasks."""
    test: Maybe[float] = None
    """Mean test score; only of each method's best on validation, as the fields below."""
    tasks: Maybe[dict[str, float]] = None
    """Test score by task."""
    mask_bytes: Maybe[dict[str, int]] = None
    """Size of each task's mask in bytes."""


class Chosen(Part):
    """The merge that the run reports and registers."""

    method: str
    """Merge method."""
    params: Params
    """All its parameters, defaults included."""
    weights: Maybe[dict[str, float]] = None
    """Weight of each expert; left out for a merge without weights."""
    key: str
    """Key of the merged adapter: SHA-256 of its recipe."""
    digest: str
    """SHA-256 of its bytes."""
    uri: str
    """Where its file is."""
    density: float
    """Share of the adapted weights that it changes."""
    bytes: int = 0
    """Size of its file; not in files of earlier versions."""
    swap_seconds: float | None = None
    """Mean seconds that an evaluator took to fetch and apply it; null of scores that are older than this figure."""
    serving_dtype: str | None
    """Type that `merged_serving` was scored with, if any."""
    rounding_loss_bfloat16: float
    """Share of the change's norm that rounding the merged weights to bfloat16 erases."""
    refined: Maybe[RefinedRow] = None
    """How it was trained on after the merge that `method` and `params` name; left out for a merge as it is."""


class Export(Part):
    """The chosen merge as a full checkpoint."""

    key: str
    """Key of the checkpoint: SHA-256 of its recipe."""
    digest: str
    """SHA-256 over its files."""
    uri: str
    """The folder where its files are."""
    dtype: str
    """Type of its floating-point tensors."""
    bytes: int
    """Size of all its files."""
    files: tuple[str, ...]
    """Names of its files."""
