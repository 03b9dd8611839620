"""What a run says about its versions: in results.json, in the terminal and in the report."""

from dataclasses import replace

import pytest

from infra.registry.runs import CHECKPOINT, MERGED
from pipeline.gate.rule import GateDecision
from pipeline.records.outcome import Verdict
from pipeline.records.results import Results
from pipeline.report.gate import gate_lines, gate_results, gate_section
from pipeline.report.markdown import report_markdown
from pipeline.report.results import build_results
from pipeline.report.summary import summary_lines
from tests.pipeline.report.given import make, told

DECISION = GateDecision(True, 0.25, 0.5, 0.25, 0.125, 0.375, {"alpha": (0.25, 0.5)}, "better")


def results(**verdicts: Verdict) -> Results:
    inputs, outcome = make()
    outcome.gate.update(verdicts)
    return build_results(inputs, outcome)


@pytest.fixture
def found() -> Results:
    return results(
        merged=Verdict("mine.merged", 4, False, 2, "challenger 0.5 vs champion | line\nbreak"),
        alpha=Verdict("mine.alpha", 3, True, 3, "better", "base", DECISION),
        beta=Verdict("mine.beta", 1, False, 1, "champion already"),
    )


def test_results_tell_each_model_apart(found: Results) -> None:
    gate = told(found)["gate"]
    assert (gate["rule"], gate["margin"], gate["confidence"]) == ("superior", 0.0, 0.95)
    assert list(gate["models"]) == ["alpha", "beta", MERGED]
    assert gate["models"]["alpha"] == {
        "name": "mine.alpha", "version": 3, "promoted": True, "champion": 3, "reason": "better", "opponent": "base",
        "difference": 0.25, "interval": [0.125, 0.375], "scores": {"opponent": 0.25, "challenger": 0.5},
        "tasks": {"alpha": {"opponent": 0.25, "challenger": 0.5}},
    }  # fmt: skip
    assert gate["models"]["beta"] | {"reason": ""} == {
        "name": "mine.beta", "version": 1, "promoted": False, "champion": 1, "reason": "", "opponent": None,
        "difference": None, "interval": None, "scores": None, "tasks": {},
    }  # fmt: skip


def test_the_terminal_says_why_the_merge_is_no_champion_and_counts_experts(found: Results) -> None:
    lines = summary_lines(found)
    assert "mine.merged version 4, challenger: challenger 0.5 vs champion | line\nbreak" in lines
    assert "experts: 1 promoted, 1 champions before, 0 challengers without promotion" in lines


def test_many_refusals_are_counted() -> None:
    inputs, outcome = make()
    held_in = {f"t{i}": inputs.config.held_in["alpha"] for i in range(8)}
    inputs = replace(inputs, config=inputs.config.model_copy(update={"held_in": held_in}))
    outcome.gate = {f"t{i}": Verdict(f"mine.t{i}", 2, False, 1, f"reason {i}") for i in range(8)}
    lines = gate_lines(gate_results(inputs, outcome))
    assert lines[0] == "experts: 0 promoted, 0 champions before, 8 challengers without promotion"
    assert lines[1:] == [f"  mine.t{i} version 2, challenger: reason {i}" for i in range(5)] + [
        "  and 3 more: see report.md"
    ]


def test_the_report_has_a_row_for_each_model(found: Results) -> None:
    section = gate_section(found.gate)
    assert "Rule: superior, 95 % interval of the difference on the gate rows." in section
    rows = [line for line in section if line.startswith("| mine")]
    assert rows == [
        "| mine.alpha | 3 | promoted | 3 | better |",
        "| mine.beta | 1 | champion | 1 | champion already |",
        "| mine.merged | 4 | challenger | 2 | challenger 0.5 vs champion \\| line break |",
    ]
    assert "\n".join(section) in report_markdown(found)


def test_a_checkpoint_has_its_line() -> None:
    found = results(**{CHECKPOINT: Verdict("mine.merged-checkpoint", 1, False, None, "made of no champion")})
    assert "mine.merged-checkpoint version 1, challenger: made of no champion" in gate_lines(found.gate)
    assert "| mine.merged-checkpoint | 1 | challenger | none | made of no champion |" in gate_section(found.gate)


def test_a_run_that_registers_nothing_has_no_section() -> None:
    found = results()
    assert gate_section(found.gate) == []
    assert gate_lines(found.gate) == []
    assert "Registered models" not in report_markdown(found)
