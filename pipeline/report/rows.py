"""What a report says of the rows that were dropped, joined or cut before anything was trained.

The counts are `pipeline.data.counting`; results of earlier versions have none.
"""

from collections.abc import Mapping

from pipeline.records.row_results import TaskRows


def lost_lines(rows: Mapping[str, TaskRows]) -> list[str]:
    """One line of all tasks together, if anything was lost."""
    ways = {
        "dropped": [sum(task.dropped.values()) for task in rows.values()],
        "joined": [task.joined for task in rows.values()],
        "cut": [task.cut.rows for task in rows.values()],
    }
    said = [
        f"{way} {sum(counts)} rows of {sum(map(bool, counts))} {'tasks' if sum(map(bool, counts)) > 1 else 'task'}"
        for way, counts in ways.items()
        if any(counts)
    ]
    return [f"data: {', '.join(said)} (report.md has them by task)"] if said else []


def rows_section(rows: Mapping[str, TaskRows]) -> list[str]:
    """The counts of tasks whose rows are not all as they were read, as Markdown."""
    told = {name: task.text.replace("|", "\\|") for name, task in rows.items() if task.text}
    head = ["", "## Rows", "", "| task | rows that were read, and what became of them |", "|---|---|"]
    return [*head, *(f"| {name} | {text} |" for name, text in told.items())] if told else []
