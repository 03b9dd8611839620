"""The merging benchmark's results as rows of JSON and as Markdown. Does not cover measuring."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.merging_cases import REFERENCE
from benchmarks.merging_measure import Usage
from benchmarks.merging_rounds import Rounds

MIB, MB = 2**20, 1e6
FLAT, TREE, FULL = "ours_adapters", "ours_tree", "ours_full"
RATIOS = (
    ("mergekit_ties", FLAT),
    ("mergekit_ties", TREE),
    ("mergekit_ties", FULL),
    ("peft_ties", FLAT),
    ("mergekit_linear", "ours_full_linear"),
    ("mergekit_linear", "ours_adapters_mean"),
    ("mergekit_ties", "ours_adapters_spectral"),
    ("mergekit_ties", "ours_full_spectral"),
    ("mergekit_ties_untrimmed", "ours_adapters_untrimmed"),
    ("mergekit_ties_untrimmed", "ours_full_untrimmed"),
    ("peft_ties_untrimmed", "ours_adapters_untrimmed"),
)
"""Peer and case of this project; what is shown is the peer's value ÷ ours."""


def row(name: str, experts: int, found: Rounds) -> dict[str, Any]:
    """A case's row: medians over the counted rounds; what has no meaning for a case is None.

    `bytes_read`: through system calls, or, where a program maps its files, from the disk in the uncounted round that
    starts with the inputs out of memory; with the store's answers. `bytes_written` likewise with what it was sent.
    """
    runs, cold = found.counted[name], found.cold.get(name)
    middle: Callable[[Callable[[Usage], float]], float] = lambda value: found.median(name, value)  # noqa: E731
    copied = found.copied.get(name)
    return {
        "name": name,
        "experts": experts,
        "wall_s": middle(_wall),
        "cpu_s": middle(lambda usage: usage.merge.cpu_s),
        "process_wall_s": middle(lambda usage: usage.process_wall_s),
        "process_cpu_s": middle(lambda usage: usage.process_cpu_s),
        "peak_rss_bytes": round(middle(_peak)),
        "peak_anonymous_bytes": round(middle(lambda usage: usage.peak_anonymous_bytes)),
        "bytes_read": max(
            round(middle(lambda usage: usage.merge.read + usage.store_read)), cold.merge.fetched if cold else 0
        ),
        "bytes_written": round(middle(lambda usage: usage.merge.written + usage.store_written)),
        "store_bytes_read": round(middle(lambda usage: usage.store_read)) if name.startswith(_STORED) else None,
        "store_bytes_written": round(middle(lambda usage: usage.store_written)) if name.startswith(_STORED) else None,
        "server_cpu_s": _server(runs, "cpu_s"),
        "server_bytes_read": _server(runs, "bytes_read"),
        "server_bytes_written": _server(runs, "bytes_written"),
        "cold_wall_s": cold.merge.wall_s if cold else None,
        "copy_s": copied,
        "share_of_disk": copied / cold.merge.wall_s if copied is not None and cold else None,
        "share_of_store": found.ratio(REFERENCE, name, _wall) if name == TREE and REFERENCE in found.counted else None,
        "walls_s": [usage.merge.wall_s for usage in runs],
        "account": runs[-1].extra,
    }


_STORED = ("ours_tree", "ours_incremental", REFERENCE)


def _wall(usage: Usage) -> float:
    return usage.merge.wall_s


def _peak(usage: Usage) -> float:
    return usage.peak_rss_bytes


def _server(runs: Sequence[Usage], key: str) -> float | None:
    values = [usage.server[key] for usage in runs if usage.server is not None]
    return statistics.median(values) if values else None


# -- text --


def main_text(report: Mapping[str, Any], found: Mapping[int, Rounds]) -> str:
    """Machine, versions, settings, then the tables: cases, ratios, the store, equality."""
    (rounds,) = found.values()
    parts = [_head(report), _case_table(report["rows"]), _ratio_table(rounds)]
    parts += [_store_table(report["rows"])] if any(each["server_cpu_s"] for each in report["rows"]) else []
    parts += [_incremental_table(report["rows"], rounds)] if "ours_incremental" in rounds.counted else []
    parts += [_equality_table(report["equality"])] if report["equality"] else []
    return "\n\n".join(parts)


def incremental_text(report: Mapping[str, Any], found: Mapping[int, Rounds]) -> str:
    """One of N experts changed."""
    (rounds,) = found.values()
    tables = [_case_table(report["rows"]), _store_table(report["rows"]), _incremental_table(report["rows"], rounds)]
    return "\n\n".join([_head(report), *tables])


def scaling_text(report: Mapping[str, Any], found: Mapping[int, Rounds]) -> str:
    """One row per number of experts."""
    lines = [
        [
            each["experts"],
            f"{each['wall_s']:.2f}",
            f"{each['cpu_s']:.2f}",
            f"{each['peak_rss_bytes'] / MIB:.0f}",
            f"{each['bytes_read'] / MB:.0f}",
            f"{each['bytes_written'] / MB:.0f}",
            f"{each['wall_s'] / each['experts'] * 1e3:.0f}",
        ]
        for each in report["rows"]
    ]
    heads = ("experts", "wall s", "CPU s", "peak RSS MiB", "read MB", "written MB", "wall ms per expert")
    return "\n\n".join([_head(report), _table(heads, lines)])


def _head(report: Mapping[str, Any]) -> str:
    settings = {k: v for k, v in report["settings"].items() if k not in ("folder", "outputs")}
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"{report['machine']}; {versions}\n{', '.join(f'{key} {value}' for key, value in settings.items())}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(map(str, cells))} |" for cells in rows])


def _number(value: float | None, unit: float = 1.0, digits: int = 2) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"


def _case_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = (
        "case", "wall s", "CPU s", "process wall s", "process CPU s", "peak RSS MiB", "of which anonymous MiB",
        "read MB", "written MB", "cold wall s", "copy ÷ cold wall",
    )  # fmt: skip
    return _table(
        heads,
        [
            [
                each["name"],
                f"{each['wall_s']:.2f}",
                f"{each['cpu_s']:.2f}",
                f"{each['process_wall_s']:.1f}",
                f"{each['process_cpu_s']:.1f}",
                f"{each['peak_rss_bytes'] / MIB:.0f}",
                f"{each['peak_anonymous_bytes'] / MIB:.0f}",
                f"{each['bytes_read'] / MB:.0f}",
                f"{each['bytes_written'] / MB:.0f}",
                _number(each["cold_wall_s"]),
                _number(each["share_of_disk"]),
            ]
            for each in rows
        ],
    )


def _ratio_table(found: Rounds) -> str:
    heads = ("peer ÷ ours", "wall", "wall of the process", "CPU", "peak RSS", "anonymous")
    values: Sequence[Callable[[Usage], float]] = (
        _wall,
        lambda usage: usage.process_wall_s,
        lambda usage: usage.merge.cpu_s,
        _peak,
        lambda usage: usage.peak_anonymous_bytes,
    )
    pairs = [(peer, ours) for peer, ours in RATIOS if peer in found.counted and ours in found.counted]
    return _table(heads, [[f"{p} ÷ {o}", *(f"{found.ratio(p, o, value):.1f}" for value in values)] for p, o in pairs])


def _store_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = (
        "in the store", "got MB", "put MB", "requests", "server CPU s", "server read MB", "server written MB",
        "share of the store's own speed",
    )  # fmt: skip
    return _table(
        heads,
        [
            [
                each["name"],
                _number(each["store_bytes_read"], MB, 0),
                _number(each["store_bytes_written"], MB, 0),
                each["account"]["store_requests"],
                _number(each["server_cpu_s"], 1, 1),
                _number(each["server_bytes_read"], MB, 0),
                _number(each["server_bytes_written"], MB, 0),
                _number(each["share_of_store"]),
            ]
            for each in rows
            if each["server_cpu_s"] is not None
        ],
    )


def _incremental_table(rows: Sequence[Mapping[str, Any]], found: Rounds) -> str:
    by_name = {each["name"]: each for each in rows}
    tree, again = by_name["ours_tree"]["account"], by_name["ours_incremental"]["account"]
    share = again["node_bytes"] / tree["node_bytes"]
    ratio = found.ratio("ours_incremental", "ours_tree", _wall)
    moved = found.ratio("ours_incremental", "ours_tree", lambda usage: usage.store_read + usage.store_written)
    heads = ("1 expert changed", "value")
    return _table(
        heads,
        [
            ["nodes of the tree", tree["nodes_made"]],
            ["nodes on the path (expected)", again["path_nodes"]],
            ["nodes made", again["nodes_made"]],
            ["path's share: bytes of its nodes' statistics ÷ bytes of all nodes'", f"{share:.3f}"],
            ["bytes got and put ÷ those of the whole tree", f"{moved:.3f}"],
            ["wall ÷ wall of the whole tree", f"{ratio:.3f}"],
            ["that ÷ the path's share", f"{ratio / share:.2f}"],
            ["that ÷ the share of bytes got and put", f"{ratio / moved:.2f}"],
        ],
    )


def _equality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("outputs", "positions", "bits differ", "largest difference", "apart", "share apart", "largest Σδ there")
    return _table(
        heads,
        [
            [
                f"{each['one']}, {each['other']}",
                each["positions"],
                f"{each['different'] / each['positions']:.1e}",
                f"{each['largest']:.1e}",
                each["apart"],
                f"{each['apart'] / each['positions']:.1e}",
                "–" if each["sum_there"] is None else f"{each['sum_there']:.1e}",
            ]
            for each in rows
        ],
    )
