"""One result from several seeds: the first one's, with mean and standard deviation of every score beside it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.records.merge_results import Chosen
from pipeline.records.results import Counts, HeldInSummary, HeldOutSummary, Results, Seconds, scores
from pipeline.records.seed_results import SeedChoice, Seeds, SeedSummary, SeedTasks, Spread


def combine(seeds: Sequence[int], results: Sequence[Results]) -> Results:
    """Results of `seeds`, in their order, as one; unchanged if there is one.

    `seeds` gets the seeds, the methods chosen, and for each group's summary and each task the spread of every score; sd
    is the sample standard deviation. What was made and reused and the seconds are added up.
    """
    first = results[0]
    if len(results) == 1:
        return first
    return first.model_copy(
        update={
            "seeds": Seeds(
                values=tuple(seeds),
                chosen=tuple(_choice(each.chosen) for each in results),
                summary=SeedSummary(
                    held_in=_spread([_means(each.summary.held_in) for each in results]),
                    held_out=_spread([_means(each.summary.held_out) for each in results]),
                ),
                tasks=SeedTasks(
                    held_in={task: _spread([scores(r.held_in[task]) for r in results]) for task in first.held_in},
                    held_out={task: _spread([scores(r.held_out[task]) for r in results]) for task in first.held_out},
                ),
            ),
            "slot_utilisation": _mean([each.slot_utilisation for each in results]),
            "made": _counts([each.made for each in results]),
            "reused": _counts([each.reused for each in results]),
            "seconds": _seconds([each.seconds for each in results]),
        }
    )


def _means(summary: HeldInSummary | HeldOutSummary) -> dict[str, float]:
    """Mean scores, and shares of gains where they are defined."""
    shares = ("retention", "of_multitask") if isinstance(summary, HeldInSummary) else ()
    known = {name: value for name in shares if (value := getattr(summary, name)) is not None}
    return scores(summary) | known


def _spread(rows: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Mean, standard deviation and values of the scores that every row has."""
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    found = {name: tuple(row[name] for row in rows) for name in shared}
    return {
        name: Spread(mean=statistics.fmean(values), sd=statistics.stdev(values), values=values)
        for name, values in found.items()
    }


def _mean(shares: Sequence[float | None]) -> float | None:
    """Of those that trained anything."""
    known = [share for share in shares if share is not None]
    return statistics.fmean(known) if known else None


def _choice(chosen: Chosen) -> SeedChoice:
    refined = chosen.refined.steps if chosen.refined is not None else None
    return SeedChoice(method=chosen.method, params=chosen.params, refined=refined)


def _counts(found: Sequence[Counts]) -> Counts:
    return Counts(**_sums(found))


def _seconds(found: Sequence[Seconds]) -> Seconds:
    return Seconds(**_sums(found))


def _sums(found: Sequence[Counts] | Sequence[Seconds]) -> dict[str, Any]:
    """Of the fields that one of them has."""
    each = {name: [value for part in found if (value := getattr(part, name)) is not None]
            for name in type(found[0]).model_fields}  # fmt: skip
    return {name: sum(values) for name, values in each.items() if values}
