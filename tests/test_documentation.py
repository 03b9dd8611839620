"""The README and the pages in docs/ as a newcomer reads them: links lead somewhere, targets of make exist, and
configurations are accepted."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pipeline.config.model import MergeConfig, PipelineConfig
from tests import refusals
from tests.e2e import runbook

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
FIRST_SCREEN = 25
"""Lines."""


def tokens(page: Path) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def targets(page: Path) -> list[str]:
    """Addresses of the page's links and pictures that lie in the repository."""
    found = [str(token.attrs.get("href") or token.attrs.get("src")) for token in tokens(page)
             if token.type in ("link_open", "image")]  # fmt: skip
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the page's headings."""
    lines = page.read_text(encoding="utf-8").splitlines()
    headings = [line.lstrip("# ") for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def pages_by_name() -> list[str]:
    return [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("name", pages_by_name())
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in targets(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_relative_to(ROOT), target
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in targets(index)}
    pages = set(PAGES)
    assert pages - linked == {ROOT / "README.md", index}


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# The `one` page\n\n[a](b.md#c) ![d](e.png) [f](https://g.example) [h](#the-one-page)\n")
    assert targets(page) == ["b.md#c", "e.png", "#the-one-page"]
    assert anchors(page) == {"the-one-page"}


def test_the_readme_is_short_and_starts_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:FIRST_SCREEN])
    assert "make demo" in first
    assert "make test" in first


def test_targets_of_make_exist() -> None:
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for page in PAGES for word in re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8"))}
    named |= {
        word
        for page in PAGES
        for block in runbook.blocks(page.read_text(encoding="utf-8"))
        for word in re.findall(r"^make ([a-z]+)", block.text, re.MULTILINE)
    }
    assert {"demo", "test", "up", "down"} <= named
    assert named <= known


def documented_yaml(beginning: str) -> list[str]:
    return [
        block.text
        for page in PAGES
        for block in runbook.blocks(page.read_text(encoding="utf-8"))
        if block.text.startswith(beginning)
    ]


def test_documented_configurations_are_accepted() -> None:
    whole, merges = documented_yaml("# my.yaml"), documented_yaml("merge:")
    assert (len(whole), len(merges)) == (2, 1)
    for text in whole:
        assert PipelineConfig.model_validate(yaml.safe_load(text)).suite == "my-suite"
    for text in merges:
        assert MergeConfig.model_validate(yaml.safe_load(text)["merge"]).export


def test_the_page_of_refusals_is_made_of_the_tests() -> None:
    """Make it again by `python -m tests.refusals`."""
    assert refusals.PAGE.read_text(encoding="utf-8") == refusals.page()
