"""report.md: well-formed, complete, and every picture in its place."""

from pipeline.report.markdown import bullets, report_markdown
from tests.pipeline.report.given import results


def test_the_report_is_well_formed_markdown() -> None:
    report = report_markdown(results())
    assert report.startswith("# mine\n")
    assert report.endswith("\n")
    tables: list[list[str]] = [[]]
    for line in report.splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    tables = [table for table in tables if table]
    assert [len(table) - 2 for table in tables] == [5, 2, 5]  # scores, candidates, intervals
    for table in tables:
        assert len({line.count("|") for line in table}) == 1, table
    for name in ("| alpha |", "| beta |", "| gamma |", "**mean of held-in**", "**mean of held-out**"):
        assert name in report
    assert "3 validation scores of 2 tasks: 2 candidates on 1 tasks; 1 candidates on 1 tasks." in report
    assert "| mean |  | 1 | 1 | 0.250 |  |" in report
    assert "| ties | lambda 0.5, density 1, density_of support | 2 | 2 | 0.500 | yes |" in report
    assert "| held-out, merged | 0.500 | 0.500 to 0.500 |" in report


def test_pictures_stand_where_they_belong_and_indented_lines_belong_to_the_one_before() -> None:
    report = report_markdown(results(), {"loss.png": b"", "scores.png": b"", "scores-2.png": b""})
    order = ["![scores](scores.png)", "![scores](scores-2.png)", "## Candidates", "## Loss", "![loss](loss.png)"]
    positions = [report.index(text) for text in order]
    assert positions == sorted(positions)
    assert "candidates.png" not in report
    assert "## Loss" not in report_markdown(results())
    assert bullets(["one", "  of it", "two"]) == ["- one", "  - of it", "- two"]
