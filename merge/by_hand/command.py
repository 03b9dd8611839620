"""What the commands of `python -m merge` do and print (`merge.commands`: their options).

Exit status: 0 done, or nothing to do; 1 something failed; 2 bad input.
"""

from __future__ import annotations

import functools
import math
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from infra.ending import message
from infra.errors import ConfigError
from merge.by_hand.checks import (
    Checked,
    adapter_bytes_estimate,
    check,
    checkpoint_bytes,
    fingerprint,
    union_estimate,
)
from merge.by_hand.defaults import DEFAULT_SHARD_GIB
from merge.by_hand.export import check_export
from merge.by_hand.outputs import prepare
from merge.by_hand.request import MergeRequest, read_request
from merge.by_hand.run import Done, merge_flat, merge_in_store, up_to_date
from merge.by_hand.sources import name_experts
from merge.methods.catalogue import METHODS, Method
from merge.methods.specs import Candidate, Choice, Number, candidate_lift, describe_plan
from workers.measuring.catalogue import MEASUREMENTS

_WIDTH = 120
_OWN_TYPES = "the base's types"


class _Failed(click.ClickException):
    exit_code = 1


class _BadInput(click.ClickException):
    exit_code = 2


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Errors become a message and an exit status: those of `_checking` 2, others 1."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except click.ClickException:
            raise
        except Exception as error:
            raise _Failed(message(error)) from error

    return run


@contextmanager
def _checking() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _BadInput(message(error)) from error


def _request(config: Path | None, given: dict[str, Any]) -> MergeRequest:
    flags = {name: value for name, value in given.items() if value is not None and value != ()}
    if "experts" in flags:
        flags["experts"] = name_experts(flags["experts"])
    if "weights" in flags:
        flags["weights"] = {name: _weight(name, text) for name, text in _pairs("--weight", flags["weights"]).items()}
    for option, name in (("--param", "params"), ("--fisher", "fisher"), ("--gram", "gram")):
        if name in flags:
            flags[name] = _pairs(option, flags[name])
    return read_request(config, flags)


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not (name and separator and value):
            raise ConfigError(f"{option} {text!r}: give NAME=VALUE")
        if name in pairs:
            raise ConfigError(f"{option} {name!r} is given twice: {pairs[name]} and {value}")
        pairs[name] = value
    return pairs


def _weight(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--weight {name}={text}: the weight is no number") from None


@_guarded
def plan(config: Path | None, **given: Any) -> None:
    """Check a merge and say what it would do, without doing it."""
    console = _console()
    with _checking(), tempfile.TemporaryDirectory(prefix="factory-merge-") as scratch:
        checked = check(_request(config, given), Path(scratch))
        _print(console, describe_plan(checked.reductions))
        console.print(_experts_table(checked))
        for line in _plan_lines(checked):
            _print(console, line)


def _experts_table(checked: Checked) -> Table:
    table = Table()
    for name, side in (("expert", "left"), ("kind", "left"), ("tensors", "right"), ("values", "right"),
                       ("density", "right"), ("source", "left")):  # fmt: skip
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    for expert in checked.experts:
        values, numel = sum(expert.counts.values()), sum(map(math.prod, expert.shapes.values()))
        table.add_row(
            escape(expert.name), expert.place.kind, f"{len(expert.shapes):,}", f"{values:,}",
            f"{values / max(1, numel):.1%}", escape(expert.place.given),
        )  # fmt: skip
    return table


def _plan_lines(checked: Checked) -> list[str]:
    positions, numel = union_estimate(checked), checked.union_elements
    lines = [
        f"base: {checked.base.name} ({checked.base.sha256[:12]}…)",
        f"union of the supports: about {positions:,} positions ({positions / max(1, numel):.1%} of "
        f"{len(checked.shapes):,} tensors), if the supports are independent",
    ]
    if checked.out:
        lines.append(f"adapter: {checked.out.given}, about {_size(adapter_bytes_estimate(checked))}")
    if METHODS[checked.candidate.method].per_task:
        lines.append(f"masks: {len(checked.experts)} files beside it, at most {_size(positions // 8)} each")
    if checked.checkpoint:
        size, limit = _size(checkpoint_bytes(checked)), checked.request.shard_gib
        dtype = checked.request.dtype or _OWN_TYPES
        lines.append(f"checkpoint: {checked.checkpoint.given}, {dtype}, {size} in files of at most {limit:g} GiB")
    if checked.request.register_as:
        lines.append(f"registered: {checked.request.register_as}, prompts stand in {checked.wrapper!r}")
    return lines + _warnings(checked)


def _warnings(checked: Checked) -> list[str]:
    notices = [f"notice: {line}" for line in checked.notices]
    if not checked.heads:
        return notices
    return [*notices, f"the classification heads of {', '.join(checked.heads)} are no part of a merge and stay behind"]


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


# -- run --


@_guarded
def run(config: Path | None, **given: Any) -> None:
    """Merge experts into an adapter, a full checkpoint, or both."""
    console = _console()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="factory-merge-") as folder:
        scratch = Path(folder)
        with _checking():
            checked = check(_request(config, given), scratch)
            for place, option in ((checked.out, "--out"), (checked.checkpoint, "--checkpoint")):
                if place:
                    prepare(place, option)
            checked = fingerprint(checked)
        for line in _warnings(checked):
            _print(console, line)
        if up_to_date(checked):
            for place in (checked.out, checked.checkpoint):
                if place:
                    _print(console, f"{place.given}: holds exactly this merge already, nothing to do")
        else:
            with _progress(console) as report, _one_torch_thread():
                done = (merge_in_store if checked.request.store else merge_flat)(checked, scratch, report)
            _print_summary(console, checked, done, time.perf_counter() - started)
        if checked.request.register_as:
            from merge.by_hand.registration import register_merge  # MLflow: seconds of imports, for this flag only

            _print(console, register_merge(checked))


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """A merge is bound by memory and disk: more threads a worker take more CPU for the same time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on a terminal, nothing in a log."""
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("merging", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _print_summary(console: Console, checked: Checked, done: Done, seconds: float) -> None:
    loss = "" if done.rounding_loss is None else f", lost by rounding to bfloat16: {done.rounding_loss:.1%} of ‖δ‖"
    lines = [
        f"{checked.candidate}: {_plural(len(checked.experts), 'expert')}, {_plural(len(checked.shapes), 'tensor')}",
        f"support of the merge: {done.density:.1%} of these tensors; ‖δ‖ {done.norm:.4g}{loss}",
    ]
    if done.checkpoint and done.checkpoint.dtype not in (None, "bfloat16"):
        loss = f"{done.checkpoint.rounding_loss:.1%} of ‖δ‖"
        lines.append(f"checkpoint in {done.checkpoint.dtype}: lost by rounding {loss}")
    if done.nodes:
        made, reused = done.nodes
        lines.append(f"merge nodes: {made} made, {reused} reused")
    lines += [f"wrote {name}: {_size(size)}" for name, size in done.files.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines.append(f"{_size(sum(done.files.values()))} written in {seconds:.1f} s, peak memory {_size(peak)}")
    for line in lines:
        _print(console, line)


# -- export --


@_guarded
def export(adapter: str, base: str, out: str, mask: str | None, dtype: str | None, shard_gib: float | None) -> None:
    """Base and ADAPTER (a file, a PEFT folder, s3://…, hub:… or models:/…) joined into a full checkpoint."""
    console = _console()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="factory-export-") as scratch:
        with _checking():
            checked = check_export(adapter, base, out, mask, dtype, shard_gib or DEFAULT_SHARD_GIB, Path(scratch))
            prepare(checked.place, "--out")
        for line in checked.adapter.notices:
            _print(console, f"notice: {line}")
        if checked.up_to_date():
            _print(console, f"{out}: holds exactly this checkpoint already, nothing to do")
            return
        info = checked.write()
    dtype = info.dtype or _OWN_TYPES
    _print(console, f"{out}: {info.parameters:,} parameters in {dtype}, {len(info.files)} files")
    _print(console, f"‖δ‖ {info.norm:.4g}, lost by rounding: {info.rounding_loss:.1%} of it")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _print(console, f"{_size(sum(info.files.values()))} written in {seconds:.1f} s, peak memory {_size(peak)}")


# -- methods --


def methods(markdown: bool) -> None:
    """Every method: parameters, weights, rounds, files beside adapters, paper."""
    if markdown:
        click.echo(methods_markdown(), nl=False)
        return
    table = Table(show_lines=True)
    for name in _COLUMNS:
        table.add_column(name, overflow="fold", no_wrap=name != "weights")
    for *cells, paper in method_rows():
        found = re.search(r"arXiv \S+?(?=[,;)\s]|$)", paper)
        table.add_row(*map(escape, cells), escape(found.group() if found else paper))
    _console().print(table)


_COLUMNS = ("method", "parameters: defaults, ranges", "weights", "rounds", "files", "paper")
_WEIGHTS = {None: "", "convex": "≥ 0, sum 1", "non_negative": "≥ 0", "any": "any"}


def method_rows() -> list[tuple[str, ...]]:
    """One row for each method that can be asked for, the columns as in the command's table."""
    return [(name, *_method_row(name, method)) for name, method in METHODS.items() if not method.internal]


def _method_row(name: str, method: Method) -> tuple[str, ...]:
    parameters = [f"{key} = {_accepted(kind)}" for key, kind in method.params.items()]
    weights = _WEIGHTS[method.weights] + (", required" if method.weights_required else "")
    candidate = Candidate(name, weights={"any": 1.0} if method.weights_required else None)
    if method.by_model:
        files = "runs a model"
    else:
        files = "writes masks" if method.per_task else _reads(candidate_lift(candidate, 1).measurement)
    return "\n".join(parameters), weights, str(candidate.rounds), files, method.paper


def _reads(measurement: str | None) -> str:
    return f"reads {MEASUREMENTS[measurement].title}" if measurement else ""


def _accepted(kind: Number | Choice) -> str:
    """A parameter's default and what it may be."""
    if isinstance(kind, Choice):
        others = [option for option in kind.options if option != kind.default]
        return f"{kind.default} (or {', '.join(others)})"
    default = kind.default if isinstance(kind.default, str) else f"{kind.default:g}"
    interval = f"{'[' if kind.low_allowed else '('}{kind.low:g}, {_plain(kind.high)}]"
    word = f", or {kind.word}" if kind.word else ""
    return f"{default} in {interval}{', whole' if kind.integer else ''}{word}"


def _plain(number: float) -> str:
    return "2⁵³" if number == 2**53 else f"{number:g}"


def methods_markdown() -> str:
    """The table of methods as Markdown."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for name, *cells in method_rows():
        row = [f"`{name}`", *(cell.replace("\n", "<br>").replace("|", "\\|") for cell in cells)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


# -- what is printed --


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
