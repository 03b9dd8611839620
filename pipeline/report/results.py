"""results.json of a run, from its outcome. What the file's fields mean is `pipeline.records.results`."""

import math
from collections.abc import Iterable
from typing import Any

from merge.methods.specs import Candidate
from pipeline.config.search import task_order
from pipeline.data.counting import rows_json
from pipeline.data.tasks import learned_elsewhere
from pipeline.records.merge_results import (
    CandidateRow,
    Chosen,
    Export,
    PerTaskRow,
    RefinedRow,
    RoundsRow,
    RungRow,
    Search,
)
from pipeline.records.outcome import Counters, Inputs, Outcome, utilisation
from pipeline.records.part import Interval
from pipeline.records.refined import Merge, Refined
from pipeline.records.results import (
    Base,
    Counts,
    HeldInSummary,
    HeldInTask,
    HeldOutSummary,
    HeldOutTask,
    Multitask,
    Results,
    Seconds,
    Summary,
)
from pipeline.records.row_results import TaskRows
from pipeline.records.score import Score, ScoreKey
from pipeline.report.gate import gate_results
from workers.scoring.metrics import bootstrap_interval

_LEAST_GAIN = 0.01
"""Mean gain of the experts below which a share of it says nothing."""


def build_results(inputs: Inputs, outcome: Outcome) -> Results:
    """The content of results.json. Raises ValueError for a score that is not a number."""
    assert outcome.chosen is not None
    config = inputs.config
    held_in = {task: _held_in(inputs, outcome, task) for task in config.held_in}
    held_out = {task: _held_out(inputs, outcome, task) for task in config.held_out}
    shown = all(row.base_few_shot is not None for row in held_in.values())
    return Results(
        run_id=inputs.run_id,
        suite=config.suite,
        objective=config.objective,
        expert=config.expert,
        base=Base(name=inputs.base.name, sha256=inputs.base.sha256),
        held_in=held_in,
        held_out=held_out,
        summary=Summary(
            held_in=_held_in_summary(inputs, outcome, held_in, shown),
            held_out=_held_out_summary(inputs, outcome, held_out, shown),
        ),
        candidates=tuple(_candidate(inputs, outcome, candidate) for candidate in _listed(inputs, outcome)),
        search=Search(
            budget=config.merge.search.evaluations,
            evaluations=sum(outcome.standings[candidate].tasks for candidate in inputs.candidates.eligible),
            rungs=tuple(RungRow(candidates=rung.candidates, tasks=rung.tasks) for rung in outcome.rungs),
        ),
        per_task=tuple(_per_task(outcome, candidate) for candidate in inputs.candidates.per_task),
        chosen=_chosen(inputs, outcome, outcome.chosen),
        learned_elsewhere=learned_elsewhere({task: inputs.tasks[task] for task in config.scored}, config.held_in),
        rows={task: TaskRows(**rows_json(data)) for task, data in inputs.tasks.items()},
        rounds=rounds_row(inputs),
        multitask=_multitask(inputs, outcome),
        export=_export(inputs, outcome),
        gate=gate_results(inputs, outcome),
        made=_counts(inputs, outcome.made),
        reused=_counts(inputs, outcome.reused),
        seconds=Seconds(**outcome.seconds),
        slots=outcome.slots,
        slot_utilisation=utilisation(outcome),
    )


# -- tasks ------------------------------------------------------------------------------------------------------


def _held_in(inputs: Inputs, outcome: Outcome, task: str) -> HeldInTask:
    manifest = outcome.experts[task]
    base, expert, merged = (_tested(outcome, model, task) for model in ("base", "expert", "merged"))
    return HeldInTask(
        metric=base.metric,
        base=base.score,
        expert=expert.score,
        merged=merged.score,
        intervals=_intervals(outcome, task, inputs.config.seed),
        n_test=base.n,
        format_free={"base": base.format_free, "expert": expert.format_free, "merged": merged.format_free},
        expert_run_id=manifest.meta.get("run_id"),
        best_step=manifest.meta.get("best_step"),
        expert_key=manifest.key,
        expert_digest=manifest.digest,
        expert_uri=inputs.store.uri(manifest.files["adapter"].name),
        base_few_shot=_if_tested(outcome, "few_shot", task),
        merged_serving=_if_tested(outcome, "serving", task),
        multitask=_if_tested(outcome, "multitask", task),
        routed=_if_tested(outcome, "routed", task),
        merged_few_shot=_if_tested(outcome, "merged_few_shot", task),
    )


def _held_out(inputs: Inputs, outcome: Outcome, task: str) -> HeldOutTask:
    base, merged = (_tested(outcome, model, task) for model in ("base", "merged"))
    return HeldOutTask(
        metric=base.metric,
        base=base.score,
        merged=merged.score,
        intervals=_intervals(outcome, task, inputs.config.seed),
        n_test=base.n,
        format_free={"base": base.format_free, "merged": merged.format_free},
        base_few_shot=_if_tested(outcome, "few_shot", task),
        multitask=_if_tested(outcome, "multitask", task),
        routed=_if_tested(outcome, "routed", task),
        merged_few_shot=_if_tested(outcome, "merged_few_shot", task),
    )


def _tested(outcome: Outcome, model: str, task: str) -> Score:
    return outcome.scores[ScoreKey(model, "test", task)]


def _if_tested(outcome: Outcome, model: str, task: str) -> float | None:
    """A score that a configuration can switch off."""
    found = outcome.scores.get(ScoreKey(model, "test", task))
    return None if found is None else found.score


def _intervals(outcome: Outcome, task: str, seed: int) -> dict[str, Interval]:
    """Intervals of a task's test scores by their names in its row."""
    named = {"base": "base", "expert": "expert", "merged": "merged", "few_shot": "base_few_shot"}
    known = {model: name for model, name in named.items() if ScoreKey(model, "test", task) in outcome.scores}
    return {name: interval(outcome, model, [task], seed) for model, name in known.items()}


# -- means ------------------------------------------------------------------------------------------------------


def _held_in_summary(inputs: Inputs, outcome: Outcome, held_in: dict[str, HeldInTask], shown: bool) -> HeldInSummary:
    """`shown`: whether every task has a score of the few-shot base."""
    rows, tasks, seed = held_in.values(), list(held_in), inputs.config.seed
    base, expert, merged = (_mean(getattr(row, model) for row in rows) for model in ("base", "expert", "merged"))
    return HeldInSummary(
        base=base,
        expert=expert,
        merged=merged,
        retention=(merged - base) / (expert - base) if expert > base + _LEAST_GAIN else None,
        base_interval=interval(outcome, "base", tasks, seed),
        expert_interval=interval(outcome, "expert", tasks, seed),
        merged_interval=interval(outcome, "merged", tasks, seed),
        format_free={model: _mean(row.format_free[model] for row in rows) for model in ("base", "expert", "merged")},
        experts_above_base=sum(row.expert > row.base for row in rows),
        base_few_shot=_mean(_known(row.base_few_shot) for row in rows) if shown else None,
        base_few_shot_interval=interval(outcome, "few_shot", tasks, seed) if shown else None,
        merged_serving=(
            _mean(_known(row.merged_serving) for row in rows) if inputs.config.evaluate.serving_dtype else None
        ),
        **_beside_multitask(inputs, outcome, held_in, base, merged),
        merged_few_shot=_few_shot_merge(inputs, rows),
        **_routed(inputs, outcome, held_in),
    )


def _few_shot_merge(inputs: Inputs, rows: Iterable[HeldInTask | HeldOutTask]) -> float | None:
    return _mean(_known(row.merged_few_shot) for row in rows) if inputs.config.yardsticks.few_shot_merge else None


def _routed(inputs: Inputs, outcome: Outcome, held_in: dict[str, HeldInTask]) -> dict[str, Any]:
    """The routed experts' fields of the summary; nothing without them."""
    if inputs.config.yardsticks.routed is None:
        return {}
    mean = _mean(_known(row.routed) for row in held_in.values())
    return {"routed": mean, "routed_interval": interval(outcome, "routed", list(held_in), inputs.config.seed)}


def _beside_multitask(
    inputs: Inputs, outcome: Outcome, held_in: dict[str, HeldInTask], base: float, merged: float
) -> dict[str, Any]:
    """The multitask adapter's fields of the summary, and what the merge has of its gain; nothing without it."""
    if outcome.multitask is None:
        return {}
    mean = _mean(_known(row.multitask) for row in held_in.values())
    share = (merged - base) / (mean - base) if mean > base + _LEAST_GAIN else None
    ends = interval(outcome, "multitask", list(held_in), inputs.config.seed)
    return {"multitask": mean, "multitask_interval": ends, "of_multitask": share}


def _held_out_summary(
    inputs: Inputs, outcome: Outcome, held_out: dict[str, HeldOutTask], shown: bool
) -> HeldOutSummary:
    if not held_out:
        return HeldOutSummary(base=None, merged=None)
    rows, tasks, seed = held_out.values(), list(held_out), inputs.config.seed
    return HeldOutSummary(
        base=_mean(row.base for row in rows),
        merged=_mean(row.merged for row in rows),
        base_interval=interval(outcome, "base", tasks, seed),
        merged_interval=interval(outcome, "merged", tasks, seed),
        format_free={model: _mean(row.format_free[model] for row in rows) for model in ("base", "merged")},
        base_few_shot=_mean(_known(row.base_few_shot) for row in rows) if shown else None,
        base_few_shot_interval=interval(outcome, "few_shot", tasks, seed) if shown else None,
        multitask=_mean(_known(row.multitask) for row in rows) if outcome.multitask is not None else None,
        routed=_mean(_known(row.routed) for row in rows) if inputs.config.yardsticks.routed else None,
        merged_few_shot=_few_shot_merge(inputs, rows),
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(sum(found) / len(found))


def _known(score: float | None) -> float:
    """A score that all tasks have where one has it."""
    assert score is not None
    return score


def interval(outcome: Outcome, model: str, tasks: list[str], seed: int, split: str = "test") -> Interval:
    """95 % bootstrap interval of a model's mean score over tasks."""
    return bootstrap_interval([outcome.scores[ScoreKey(model, split, task)].resampled for task in tasks], seed=seed)


# -- merges -----------------------------------------------------------------------------------------------------


def _listed(inputs: Inputs, outcome: Outcome) -> list[Merge]:
    """All merges that could be chosen, refined ones last."""
    return [*inputs.candidates.eligible, *(each for each in outcome.standings if isinstance(each, Refined))]


def _candidate(inputs: Inputs, outcome: Outcome, candidate: Merge) -> CandidateRow:
    """A candidate's row: how far it came, and the mean validation score over the tasks it was scored on."""
    standing, model, seed = outcome.standings[candidate], candidate.to_json(), inputs.config.seed
    tasks = task_order(list(inputs.config.held_in), seed)[: standing.tasks]
    scores = {task: outcome.scores[ScoreKey(model, "validation", task)].score for task in tasks}
    first = [scores[task] for task in tasks[: outcome.rungs[0].tasks]]
    told = any(candidate in (each, each.start) for each in outcome.standings if isinstance(each, Refined))
    return CandidateRow(
        **_told(candidate),
        validation=standing.mean,
        interval=interval(outcome, model, list(tasks), seed, "validation"),
        first_rung=math.fsum(first) / len(first),
        tasks=standing.tasks,
        rung=standing.rung,
        chosen=candidate == outcome.chosen,
        by_task={task: scores[task] for task in inputs.config.held_in}
        if told and standing.tasks == len(inputs.config.held_in)
        else None,
        **_refined(outcome, candidate),
    )


def _per_task(outcome: Outcome, candidate: Candidate) -> PerTaskRow:
    """A candidate that needs the task at inference; test scores for each method's best on validation."""
    validation = outcome.mean(candidate, "validation")
    if candidate not in outcome.per_task.values():
        return PerTaskRow(**_told(candidate), validation=validation)
    return PerTaskRow(
        **_told(candidate),
        validation=validation,
        test=outcome.mean(candidate, "test"),
        tasks={task: _tested(outcome, candidate.to_json(), task).score for task in outcome.experts},
        mask_bytes={task: outcome.masks[candidate, task].files["mask"].size for task in outcome.experts},
    )


def _chosen(inputs: Inputs, outcome: Outcome, candidate: Merge) -> Chosen:
    merged = outcome.merged[candidate]
    return Chosen(
        **_told(candidate),
        key=merged.key,
        digest=merged.digest,
        uri=inputs.store.uri(merged.files["adapter"].name),
        density=merged.meta["density"],
        bytes=merged.files["adapter"].size,
        swap_seconds=_swap_seconds(outcome, candidate),
        serving_dtype=inputs.config.evaluate.serving_dtype,
        rounding_loss_bfloat16=merged.meta["rounding_loss_bfloat16"],
        **_refined(outcome, candidate),
    )


def rounds_row(inputs: Inputs) -> RoundsRow | None:
    """In how many rounds the experts were trained, if in several."""
    rounds, between = inputs.config.rounds, inputs.candidates.between
    if between is None:
        return None
    return RoundsRow(count=rounds.count, support=rounds.support, **_told(between))


def _told(candidate: Merge) -> dict[str, Any]:
    """The fields `method`, `params` and `weights`."""
    return {"method": candidate.method, "params": candidate.params, "weights": candidate.weights}


def _refined(outcome: Outcome, candidate: Merge) -> dict[str, Any]:
    """The field `refined`, where it says something."""
    if not isinstance(candidate, Refined):
        return {}
    told = outcome.merged[candidate].meta["refined"]
    return {"refined": RefinedRow(steps=told["steps"], rows=told["rows"], share=told["share"])}


def _multitask(inputs: Inputs, outcome: Outcome) -> Multitask | None:
    """The yardstick, if there is one."""
    made = outcome.multitask
    if made is None:
        return None
    told = {name: made.meta["refined"][name] for name in ("steps", "rows", "share")}
    return Multitask(key=made.key, digest=made.digest, uri=inputs.store.uri(made.files["adapter"].name), **told)


def _counts(inputs: Inputs, counted: Counters) -> Counts:
    """What a configuration does not ask for is left out."""
    config = inputs.config
    yardsticks = {"yardsticks": config.yardsticks.multitask, "routers": config.yardsticks.routed}
    optional = {"refined": config.refine, "teachers": config.asking, **yardsticks}
    return Counts(**{name: n for name, n in vars(counted).items() if optional.get(name, counted) is not None})


def _swap_seconds(outcome: Outcome, candidate: Merge) -> float | None:
    """Mean seconds that an evaluator took to fetch and apply the chosen merge; None of scores that are older than this
    figure."""
    asked = (("merged", "test"), (candidate.to_json(), "validation"))  # tested last, it may be in place already
    scores = [score for (model, split, _), score in outcome.scores.items() if (model, split) in asked]
    seconds = [score.swap_seconds for score in scores if score.swap_seconds]
    return sum(seconds) / len(seconds) if seconds else None


def _export(inputs: Inputs, outcome: Outcome) -> Export | None:
    """The chosen merge as a full checkpoint, if one was made."""
    checkpoint = outcome.checkpoint
    if checkpoint is None:
        return None
    first = next(iter(checkpoint.files.values()))
    return Export(
        key=checkpoint.key,
        digest=checkpoint.digest,
        uri=inputs.store.uri(first.name.rpartition("/")[0] + "/"),
        dtype=checkpoint.config["dtype"],
        bytes=sum(file.size for file in checkpoint.files.values()),
        files=tuple(sorted(checkpoint.files)),
    )
