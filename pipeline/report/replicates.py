"""One result from several seeds: the first one's, with mean and standard deviation of every score beside it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SCORES = ("base", "base_few_shot", "expert", "merged", "merged_serving", "retention")


def combine(seeds: Sequence[int], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of `seeds`, in their order, as one; unchanged if there is one.

    `seeds` gets the seeds, the methods chosen, and for each group's summary and each task `{mean, sd, values}` of every
    score; sd is the sample standard deviation. What was made and reused and the seconds are added up.
    """
    first = results[0]
    if len(results) == 1:
        return first
    groups = ("held_in", "held_out")
    return first | {
        "seeds": {
            "values": list(seeds),
            "chosen": [{name: found["chosen"][name] for name in ("method", "params")} for found in results],
            "summary": {group: _spread([found["summary"][group] for found in results]) for group in groups},
            "tasks": {
                group: {task: _spread([found[group][task] for found in results]) for task in first[group]}
                for group in groups
            },
        },
        "slot_utilisation": _mean([found["slot_utilisation"] for found in results]),
        **{name: _added([found[name] for found in results]) for name in ("made", "reused", "seconds")},
    }


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation and values of the scores that every row has."""
    shared = [name for name in SCORES if all(row.get(name) is not None for row in rows)]
    return {
        name: {
            "mean": statistics.fmean(row[name] for row in rows),
            "sd": statistics.stdev(row[name] for row in rows),
            "values": [row[name] for row in rows],
        }
        for name in shared
    }


def _mean(shares: Sequence[float | None]) -> float | None:
    """Of those that trained anything."""
    known = [share for share in shares if share is not None]
    return statistics.fmean(known) if known else None


def _added(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(count[name] for count in counts) for name in counts[0]}
