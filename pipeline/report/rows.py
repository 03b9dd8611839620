"""What a report says of the rows that were dropped, joined or cut before anything was trained.

The counts are `pipeline.data.counting`; results of earlier versions have none.
"""

from collections.abc import Mapping
from typing import Any


def lost_lines(results: Mapping[str, Any]) -> list[str]:
    """One line of all tasks together, if anything was lost."""
    rows = list(results.get("rows", {}).values())
    ways = {
        "dropped": [sum(row["dropped"].values()) for row in rows],
        "joined": [row["joined"] for row in rows],
        "cut": [row["cut"]["rows"] for row in rows],
    }
    said = [
        f"{way} {sum(counts)} rows of {sum(map(bool, counts))} {'tasks' if sum(map(bool, counts)) > 1 else 'task'}"
        for way, counts in ways.items()
        if any(counts)
    ]
    return [f"data: {', '.join(said)} (report.md has them by task)"] if said else []


def rows_section(results: Mapping[str, Any]) -> list[str]:
    """The counts of tasks whose rows are not all as they were read, as Markdown."""
    rows = results.get("rows", {})
    told = {task: row["text"].replace("|", "\\|") for task, row in rows.items() if row["text"]}
    head = ["", "## Rows", "", "| task | rows that were read, and what became of them |", "|---|---|"]
    return [*head, *(f"| {task} | {text} |" for task, text in told.items())] if told else []
