"""The gate in results.json, in the report and in the terminal: which versions became champions, why others did not."""

from infra.registry.runs import CHECKPOINT, MERGED
from pipeline.records.gate_results import Gate, Pair, VersionRow
from pipeline.records.outcome import Inputs, Outcome, Verdict

_LISTED = 5
"""Experts whose refusal the terminal spells out; the report has them all."""


def gate_results(inputs: Inputs, outcome: Outcome) -> Gate:
    """The section `gate` of results.json: the rule, and per task (and `merged`) what became of the version."""
    gate = inputs.config.gate
    order = [*inputs.config.held_in, MERGED, CHECKPOINT]
    return Gate(
        rule=gate.rule,
        margin=gate.margin,
        confidence=gate.confidence,
        models={task: _row(outcome.gate[task]) for task in order if task in outcome.gate},
    )


def _row(verdict: Verdict) -> VersionRow:
    found = verdict.decision
    pairs = found.tasks if found else {}
    return VersionRow(
        name=verdict.name,
        version=verdict.version,
        promoted=verdict.promoted,
        champion=verdict.champion,
        reason=verdict.reason,
        opponent=verdict.opponent,
        difference=found.difference if found else None,
        interval=(found.low, found.high) if found else None,
        scores=Pair(opponent=found.champion, challenger=found.challenger) if found else None,
        tasks={task: Pair(opponent=before, challenger=after) for task, (before, after) in pairs.items()},
    )


def gate_lines(gate: Gate) -> list[str]:
    """What stands under the table of scores: the merge's verdict, and a count of the experts'."""
    lines = [_verdict(gate.models[task]) for task in (MERGED, CHECKPOINT) if task in gate.models]
    experts = [row for task, row in gate.models.items() if task not in (MERGED, CHECKPOINT)]
    if experts:
        promoted = sum(row.promoted for row in experts)
        refused = [row for row in experts if not _leads(row)]
        before = len(experts) - promoted - len(refused)
        lines.append(
            f"experts: {promoted} promoted, {before} champions before, {len(refused)} challengers without promotion"
        )
        lines += [f"  {_verdict(row)}" for row in refused[:_LISTED]]
        if len(refused) > _LISTED:
            lines.append(f"  and {len(refused) - _LISTED} more: see report.md")
    return lines


def _leads(row: VersionRow) -> bool:
    return row.champion == row.version


def _state(row: VersionRow) -> str:
    if row.promoted:
        return "promoted"
    return "champion" if _leads(row) else "challenger"


def _verdict(row: VersionRow) -> str:
    return f"{row.name} version {row.version}, {_state(row)}: {row.reason}"


def gate_section(gate: Gate) -> list[str]:
    """The section of report.md."""
    if not gate.models:
        return []
    margin = f", margin {gate.margin:g}" if gate.margin else ""
    lines = [
        "## Registered models",
        "",
        f"Rule: {gate.rule.replace('_', ' ')}{margin}, {100 * gate.confidence:g} % interval of the difference on "
        "the gate rows.",
        "",
        "| model | version | state | champion | why |",
        "|---|---:|---|---:|---|",
    ]
    for row in gate.models.values():
        reason = row.reason.replace("|", "\\|").replace("\n", " ")
        cells = [row.name, row.version, _state(row), row.champion or "none", reason]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]
