"""Which of a source's rows count as one, and what became of those that do not stay as they were: counted by reason.

Rows with closed answers (options, labels) that contradict each other are put to the vote; free answers to one input are
all right. Reading rows is `pipeline.data.sources`, cutting them into splits `pipeline.data.tasks`.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from workers.text.rows import Row

DistinctBy = Literal["text", "words"]
_UNSEEN = ("Cf", "Zl", "Zp", "Zs")
"""Unicode's categories of format characters and of blanks."""


@dataclass(frozen=True)
class RowCounts:
    """Rows of a source by what became of them; each row that is not kept has one reason."""

    read: int = 0
    kept: int = 0
    """Distinct rows, before they are cut to the sizes of the splits."""
    blank_input: int = 0
    blank_target: int = 0
    outvoted: int = 0
    """Rows of a closed answer where more rows with the same input have another one."""
    undecided: int = 0
    """Rows of closed answers to the same input, none of which most rows have."""
    other_options: int = 0
    """Rows with the input of another row and other options."""
    joined: int = 0
    """Rows that say again what another one says, or give another free answer to its input."""
    several_answers: int = 0
    """Kept rows that are joined of rows with different free answers: each counts as right, the commonest is taught."""
    alike: int = 0
    """Kept rows whose input differs from that of another kept row in case or whitespace only, or whose options do."""

    @property
    def dropped(self) -> dict[str, int]:
        """Rows whose answer is in no split, by reason, for people."""
        reasons = {
            "with a blank input": self.blank_input,
            "with a blank target": self.blank_target,
            "contradict most rows with the same input": self.outvoted,
            "contradict each other, same input and no majority": self.undecided,
            "with the same input as another row and other options": self.other_options,
        }
        return {reason: count for reason, count in reasons.items() if count}

    @property
    def dropped_share(self) -> float:
        return sum(self.dropped.values()) / max(1, self.read)


class Distinct(NamedTuple):
    """A row that stands for all that count as the same."""

    words: str
    """Its normalised input, which decides about its split."""
    row: Row
    """Its id is the source's, if it has one."""
    first: bool = True
    """False for a row that comes after another one with the same normalised input."""

    def named(self) -> Row:
        """The row, its id a hash of its content: of the normalised input for the first one that has it."""
        row = self.row
        name = content_hash(self.words) if self.first else content_hash(row.input, "", *sorted(row.options or ()))
        return replace(row, id=name[:16])


def normalised(text: str) -> str:
    """An input without case and without differences in whitespace."""
    return " ".join(text.casefold().split())


def is_blank(text: str) -> bool:
    """Whether nothing of a text is seen: blanks, and characters without a shape of their own."""
    left = text.strip()
    return not left or (not left.isascii() and all(unicodedata.category(each) in _UNSEEN for each in left))


def content_hash(*parts: str) -> str:
    """Hex SHA-256 of texts in their order."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


def distinct_rows(
    rows: Sequence[Row], closed: bool = False, by: DistinctBy = "text"
) -> tuple[list[Distinct], RowCounts]:
    """The rows that are left when those that count as one are joined, in no particular order, and what became of all.

    `by` text: the same input to the letter, and the same options; words: the same but for case and whitespace, whatever
    the options, of which those that come first by content stay. `closed`: targets are labels, even without options.
    What is kept does not depend on the order of `rows`.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    blank_input = blank_target = 0
    for row in rows:
        words = normalised(row.input)
        if is_blank(words):
            blank_input += 1
        elif all(is_blank(target) for target in row.targets):
            blank_target += 1
        else:
            exact = (row.input, *sorted(set(row.options or ()))) if by == "text" else ()
            groups.setdefault((words, *exact), []).append(row)
    kept, lost, several = _judged(groups, closed, by)
    counts = RowCounts(
        read=len(rows),
        kept=len(kept),
        blank_input=blank_input,
        blank_target=blank_target,
        **lost,
        joined=len(rows) - blank_input - blank_target - sum(lost.values()) - len(kept),
        several_answers=several,
        alike=sum(count for count in Counter(words for words, _ in kept).values() if count > 1),
    )
    return _ordered(kept), counts


def _judged(
    groups: dict[tuple[str, ...], list[Row]], closed: bool, by: DistinctBy
) -> tuple[list[tuple[str, Row]], Counter[str], int]:
    """One row for each group that has an answer, with its normalised input; rows that are lost, by reason; and how many
    rows are joined of different free answers."""
    kept: list[tuple[str, Row]] = []
    lost: Counter[str] = Counter()
    several = 0
    for (words, *_), group in groups.items():
        if len(group) == 1 and not _is_free(group[0], closed):
            kept.append((words, group[0]))
            continue
        if len(group) > 1:
            group = sorted(group, key=_content)
        if all(_is_free(row, closed) for row in group):
            kept.append((words, _with_all_answers(group, commonest_first=by == "text")))
            several += len({frozenset(row.targets) for row in group}) > 1
            continue
        same = [row for row in group if set(row.options or ()) == set(group[0].options or ())]
        lost["other_options"] += len(group) - len(same)
        votes = Counter(frozenset(row.targets) for row in same)
        (answer, most), *others = votes.most_common()
        if by == "text" and others and others[0][1] == most:
            lost["undecided"] += len(same)
            continue
        lost["outvoted"] += len(same) - most
        kept.append((words, next(row for row in same if frozenset(row.targets) == answer)))
    return kept, lost, several


def _is_free(row: Row, closed: bool) -> bool:
    return row.options is None and not closed


def _with_all_answers(group: Sequence[Row], commonest_first: bool) -> Row:
    """The first row of a group with the targets of all."""
    if len(group) == 1 and len(group[0].targets) == 1:
        return group[0]  # its target is not blank
    targets = Counter(target for row in group for target in dict.fromkeys(row.targets) if not is_blank(target))
    ordered = [target for target, _ in targets.most_common()] if commonest_first else list(targets)
    return Row("", group[0].input, tuple(ordered), None)


def _content(row: Row) -> str:
    return content_hash(row.input, *row.targets, "", *(row.options or ()))


def _ordered(kept: Iterable[tuple[str, Row]]) -> list[Distinct]:
    """Those with the same normalised input after each other, by content."""
    alike: dict[str, list[Row]] = {}
    for words, row in kept:
        alike.setdefault(words, []).append(row)
    found = []
    for words, rows in alike.items():
        if len(rows) > 1:
            rows.sort(key=_content)
        found += [Distinct(words, row, at == 0) for at, row in enumerate(rows)]
    return found
