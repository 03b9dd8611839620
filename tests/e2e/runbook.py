"""Runs the shell commands of a page of the documentation as they are written, from top to bottom, in one shell.

    python -m tests.e2e.runbook docs/operations.md
    python -m tests.e2e.runbook docs/operations.md --section "Every night" --section "Cleaning up"

For a checkout with `make venv` done; a fresh clone is best, since the commands leave files. They see each other's
variables, as those that a person types. The first that fails ends it. Blocks that need what a test machine lacks are
named and left out. Does not compare what the commands print with anything: that is read by whoever runs this.

Exit status: 0 every command succeeded; otherwise that of the one that failed.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "[Service]": "a unit file, no command",
    "docker": "needs a container engine",
    "kubectl": "needs a Kubernetes cluster",
    "ray start": "needs machines of its own (tests/e2e/test_cluster.py starts three)",
}
"""Beginnings of blocks that are not run, and why."""


@dataclass(frozen=True)
class Block:
    """An indented block of a page: the heading that it stands under, its first line's number, its text."""

    section: str
    line: int
    text: str

    def left_out(self) -> str | None:
        """Why it is not run; None if it is."""
        found = (why for start, why in ELSEWHERE.items() if self.text.startswith(start))
        return next(found, None)


def blocks(page: str) -> list[Block]:
    """The indented blocks of a page, in their order."""
    found, section = [], ""
    tokens = MarkdownIt().parse(page)
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            section = tokens[number + 1].content
        elif token.type == "code_block" and token.map:
            found.append(Block(section, token.map[0] + 1, token.content))
    return found


def script(chosen: Iterable[Block]) -> str:
    """What `bash -e` is given. Each block is printed before it is run; `set -v` would also print what `eval` is given,
    credentials among it."""
    parts = [". .venv/bin/activate"]
    for block in chosen:
        why = block.left_out()
        shown = f"\n── line {block.line}, {block.section}{f': left out, {why}' if why else ''}\n{block.text.rstrip()}\n"
        parts += [f"printf '%s\\n' {shlex.quote(shown)}", "" if why else block.text]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.runbook", description="Run a page's commands.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--section", action="append", help="only what stands under this heading; may be repeated")
    options = parser.parse_args(arguments)
    found = blocks(options.page.read_text(encoding="utf-8"))
    unknown = set(options.section or ()) - {block.section for block in found}
    if unknown:
        parser.error(f"{options.page} has no commands under {', '.join(map(repr, sorted(unknown)))}")
    chosen = [block for block in found if not options.section or block.section in options.section]
    started = time.monotonic()
    with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(script(chosen))
        file.flush()
        code = subprocess.run(["bash", "-e", file.name], cwd=ROOT, stderr=subprocess.STDOUT).returncode
    left_out = sum(block.left_out() is not None for block in chosen)
    print(
        f"\n{options.page}: {len(chosen) - left_out} blocks run, {left_out} left out, exit status {code}, "
        f"{time.monotonic() - started:.0f} s"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
