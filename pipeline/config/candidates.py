"""The merge candidates of a configuration: lists expanded, weights completed, names checked, the plan in words.

Everything here works on names and numbers and fails before any service is asked.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from infra.errors import ConfigError
from merge.methods.catalogue import METHODS
from merge.methods.parameters import Value
from merge.methods.specs import Candidate, check_candidate, describe_plan, plan_reductions
from pipeline.config.expert_kinds import EXPERT_KINDS
from pipeline.config.model import PipelineConfig
from pipeline.config.rounds import CandidateConfig, Weights
from pipeline.config.search import plan_rungs


@dataclass(frozen=True)
class Candidates:
    """What is merged and scored. `all` is in the configuration's order, without repeats."""

    all: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    """Candidates that were left out, and why."""
    between: Candidate | None = None
    """How the experts of a round are merged for the next one, if there is a next one."""

    @cached_property
    def eligible(self) -> tuple[Candidate, ...]:
        """Those that may be chosen."""
        return tuple(candidate for candidate in self.all if not METHODS[candidate.method].per_task)

    @cached_property
    def per_task(self) -> tuple[Candidate, ...]:
        """Those that need the task at inference: scored beside, never chosen."""
        return tuple(candidate for candidate in self.all if METHODS[candidate.method].per_task)


def list_candidates(config: PipelineConfig, rows: Mapping[str, int] | None = None) -> Candidates:
    """Candidates of the configuration. `rows`: training rows of each held-in task, for weights `training_rows`; without
    them those count as equal, which is enough to check the rest.

    Raises MergeError or ConfigError for an unknown method, parameter or task, weights that do not suit the method, only
    methods that cannot be chosen, or a search budget that is too small.
    """
    experts = list(config.held_in)
    shares = _shares(rows or dict.fromkeys(experts, 1), experts)
    found: dict[Candidate, None] = {}
    for entry in config.merge.candidates:
        if entry.method in METHODS and METHODS[entry.method].internal:
            raise ConfigError(f"merge method {entry.method!r} is a step of other methods and no candidate by itself")
        for params in expand(entry):
            for weights in _weights(entry):
                candidate = Candidate(entry.method, params, shares if weights == "training_rows" else weights)
                check_candidate(candidate, experts)
                if METHODS[entry.method].by_model and config.objective == "classification":
                    raise ConfigError(
                        f"merge method {entry.method!r} runs one model on the rows of all tasks, but in a "
                        "classification every task has a head of its own: leave it out"
                    )
                found[candidate] = None
    notes = []
    if EXPERT_KINDS[config.expert].everywhere or config.mask.shared:
        for candidate in [candidate for candidate in found if _same_on_one_support(candidate) in found]:
            del found[candidate]
            notes.append(
                f"{candidate} is left out: all experts hold the same positions, where it equals "
                f"{_same_on_one_support(candidate)}"
            )
    between = _between(config, shares) if config.rounds.count > 1 else None
    listed = Candidates(tuple(found), tuple(notes), between)
    if not listed.eligible:
        raise ConfigError(
            "merge.candidates: every method listed needs the task at inference "
            f"({', '.join(map(str, listed.per_task))}), so none can be chosen; add another, for example mean"
        )
    plan_rungs(len(listed.eligible), len(experts), config.merge.search.evaluations)
    if between is not None:
        _check_later_rounds((*listed.all, between), len(experts))
    if config.refine is not None and config.refine.merges > len(listed.eligible):
        raise ConfigError(
            f"refine.merges is {config.refine.merges}, but merge.candidates lists {len(listed.eligible)} that can be "
            "chosen: lower it to that, or list more"
        )
    return listed


def _between(config: PipelineConfig, shares: Mapping[str, float]) -> Candidate:
    """How the experts of a round are merged for the next one. Raises as `list_candidates`."""
    entry = config.rounds.merge
    found = [
        Candidate(entry.method, params, shares if weights == "training_rows" else weights)
        for params in expand(entry)
        for weights in _weights(entry)
    ]
    if METHODS[entry.method].internal:
        raise ConfigError(f"merge method {entry.method!r} is a step of other methods and no merge by itself")
    if len(found) > 1:
        raise ConfigError(f"rounds.merge is {len(found)} merges, but nothing is scored between rounds: give one")
    check_candidate(found[0], list(config.held_in))
    return found[0]


def _check_later_rounds(candidates: Iterable[Candidate], experts: int) -> None:
    """Raises ConfigError for a method that needs more of a later round's experts than their changes."""
    for candidate in candidates:
        method = METHODS[candidate.method]
        measured = any(each.spec.measurement for each in plan_reductions([candidate], experts))
        for does, what in (
            (method.per_task, "needs the task at inference"),
            (method.by_model, "runs a model"),
            (measured, "reads measurements of the experts"),
        ):
            if does:
                raise ConfigError(
                    f"merge method {candidate.method!r} {what}, which is not there for experts of several rounds: "
                    "leave it out, or set rounds=1"
                )


def expand(entry: CandidateConfig) -> Iterator[dict[str, Value]]:
    """Parameters of the entry's candidates: every combination of values, the last parameter's changing fastest."""
    grids: list[dict[str, Value]] = [{}]
    for name, value in entry.params.items():
        choices = value if isinstance(value, list) else [value]
        grids = [{**grid, name: choice} for grid in grids for choice in choices]
    yield from grids


def _weights(entry: CandidateConfig) -> list[Weights | None]:
    return list(entry.weights) if isinstance(entry.weights, list) else [entry.weights]


def _shares(rows: Mapping[str, int], experts: list[str]) -> dict[str, float]:
    total = sum(rows[name] for name in experts)
    return {name: rows[name] / total for name in experts}


def _same_on_one_support(candidate: Candidate) -> Candidate | None:
    """The candidate that gives the same δ where every expert holds the same positions."""
    if candidate.method != "overlap_mean":
        return None
    if candidate.weights is None:
        return Candidate("mean")
    return Candidate("weighted_mean", {}, candidate.weights)


def merge_plan(config: PipelineConfig, listed: Candidates) -> str:
    """What merging will take, in words: candidates, reductions and rounds, and evaluations."""
    tasks = len(config.held_in)
    rungs = plan_rungs(len(listed.eligible), tasks, config.merge.search.evaluations)
    scored = sum(rung.candidates * rung.tasks for rung in rungs)
    halving = ", ".join(f"{rung.candidates} on {rung.tasks}" for rung in rungs)
    lines = [
        f"merge: {len(listed.all)} candidates, {scored} of {len(listed.eligible) * tasks} validation scores to choose "
        f"among {len(listed.eligible)} (candidates on further tasks: {halving}); "
        + describe_plan(plan_reductions(listed.all, tasks))
    ]
    if listed.per_task:
        lines.append(
            f"{', '.join(map(str, listed.per_task))}: needs the task at inference; {len(listed.per_task) * tasks} "
            "further scores, never chosen"
        )
    if listed.between is not None:
        lines.append(
            f"rounds: experts are trained in {config.rounds.count}, each from the merge of the one before by "
            f"{listed.between}; the above is of the last"
        )
    if (refine := config.refine) is not None:
        rows = refine.rows(tasks)
        lengths = ", ".join(map(str, refine.steps))
        lines.append(
            f"refining: the best {refine.merges} of them, each by {lengths} steps of {rows} training rows; "
            f"{refine.merges * len(refine.steps) * tasks} further validation scores"
        )
    return "\n".join([*lines, *listed.notes])
