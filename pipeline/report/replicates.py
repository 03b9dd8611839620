"""One result from several seeds: the first one's, with mean and standard deviation of every score beside it."""

import statistics
from collections.abc import Mapping, Sequence

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
                chosen=tuple(SeedChoice(method=each.chosen.method, params=each.chosen.params) for each in results),
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
    """Mean scores, and retention where it is defined."""
    found = scores(summary)
    if isinstance(summary, HeldInSummary) and summary.retention is not None:
        found["retention"] = summary.retention
    return found


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


def _counts(found: Sequence[Counts]) -> Counts:
    return Counts(**{name: sum(getattr(each, name) for each in found) for name in Counts.model_fields})


def _seconds(found: Sequence[Seconds]) -> Seconds:
    return Seconds(**{name: sum(getattr(each, name) for each in found) for name in Seconds.model_fields})
