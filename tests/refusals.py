"""docs/refusals.md, made from the tables of the tests that try each refusal: `python -m tests.refusals`."""

import importlib
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "refusals.md"
TABLES = {
    "The configuration": (
        ("tests.pipeline.config.test_document", "REFUSED"),
        ("tests.pipeline.config.test_document", "OVERRIDES"),
        ("tests.pipeline.config.test_refusals", "CASES"),
        ("tests.pipeline.config.test_refusals", "FILES"),
    ),
    "Data": (
        ("tests.pipeline.data.test_sources", "REFUSED"),
        ("tests.pipeline.data.test_sources", "HUB_REFUSED"),
        ("tests.pipeline.data.test_counting", "REFUSED"),
        ("tests.infra.schedule.test_scheduler", "LEFT_OUT"),
    ),
    "The base and its prompts": (
        ("tests.workers.base.test_load", "REFUSED"),
        ("tests.pipeline.plan.test_check_base", "REFUSED"),
        ("tests.workers.text.test_wrapper", "REFUSED"),
    ),
    "Merging and converting": (
        ("tests.merge.by_hand.test_refusals", "REFUSED"),
        ("tests.workers.conversion.test_peft_folders", "REFUSED"),
    ),
    "The object store, MLflow, Ray": (
        ("tests.infra.store.test_faults", "REFUSED"),
        ("tests.infra.registry.test_faults", "REFUSED"),
        ("tests.pipeline.plan.test_cluster", "REFUSED"),
        ("tests.pipeline.plan.test_waiting", "REFUSED"),
    ),
    "Outputs": (("tests.infra.test_outputs", "REFUSED"),),
}
"""Where the tables stand: case to a tuple whose last text is what is read, or a pattern of it."""
HEAD = """# What is refused, and what you read

Everything here ends a command before work starts, with exit status 2 and one line, of which the table has the part that
matters; `…` stands for names and numbers. Every row is a test; `python -m tests.refusals` makes this page of them.
"""


def words(pattern: str) -> str:
    """A pattern of a message as text."""
    text = re.sub(r"\\([^\w\s])", r"\1", pattern.replace(".*", " … ").replace(r"\d+", "…"))
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def message(case: Any) -> str:
    """What a case of a table says is read."""
    parts = [case] if isinstance(case, str) else [part for part in case if isinstance(part, str)]
    return words(parts[-1]) if parts else ""


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, tables in TABLES.items():
        rows = {
            str(name): message(case)
            for module, table in tables
            for name, case in _items(getattr(importlib.import_module(module), table))
        }
        lines += [f"## {title}", "", "| case | what you read |", "|---|---|"]
        lines += [f"| {words(name)} | {text} |" for name, text in rows.items() if text]
        lines.append("")
    return "\n".join(lines)


def _items(table: Any) -> list[tuple[Any, Any]]:
    return list(table.items()) if isinstance(table, dict) else [(case[0], case) for case in table]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
