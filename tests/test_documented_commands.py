"""Every `python -m …` of the README and the pages in docs/ names a command that exists, with options that it has."""

import contextlib
import io
import re
import runpy
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.e2e import runbook

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
WITH_COMMANDS = ("pipeline", "merge", "workers.convert", "infra.stack")
_COMMAND = re.compile(r"python -m ([a-z][a-z0-9_.]*)([^`)#\n]*)")
_OPTION = re.compile(r"(?<=\s)--[a-z][a-z0-9-]*")


def documented() -> dict[tuple[str, ...], dict[str, str]]:
    """Module and command → each option that a page gives it → that page."""
    found: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for module, rest in _COMMAND.findall(text):
            words = rest.split()
            named = module in WITH_COMMANDS and bool(words) and re.fullmatch(r"[a-z-]+", words[0])
            command = (module, words[0]) if named else (module,)
            found[command].update(dict.fromkeys(_OPTION.findall(rest.split(" -- ")[0]), page.name))
    return found


def help_of(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> str:
    module, *rest = command
    monkeypatch.setattr(sys, "argv", [module, *rest, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code in (0, None), f"python -m {' '.join(command)}: no such command"
    return printed.getvalue()


def test_the_pages_have_commands() -> None:
    assert {("pipeline", "plan"), ("pipeline", "gc"), ("merge", "run"), ("workers.convert", "to-peft")} <= set(
        documented()
    )
    assert ("pipeline", "results-schema") in documented()
    assert documented()["pipeline", "gc"] == {"--keep-days": "operations.md", "--remove": "operations.md"}


@pytest.mark.parametrize(
    "command", sorted(set(documented()) - {("infra.environment",), ("merge",), ("tests.refusals",)}), ids=" ".join
)
def test_documented_options_exist(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(command, monkeypatch)
    for option, page in documented()[command].items():
        assert re.search(rf"{option}\b", text), f"{page}: python -m {' '.join(command)} has no {option}"


def test_the_runbook_is_read_whole() -> None:
    """What `python -m tests.e2e.runbook` would run is shell, and every section of the page has something to run."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    found = runbook.blocks(page)
    indented = [line for line in page.splitlines() if line.startswith("    ")]
    assert [line for block in found for line in block.text.splitlines() if line] == [line[4:] for line in indented]
    run = {block.section for block in found if not block.left_out()}
    assert run == {heading[3:] for heading in page.splitlines() if heading.startswith("## ")}
