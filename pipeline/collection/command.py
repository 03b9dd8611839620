"""`python -m pipeline gc`: what no kept run and no registered version needs goes from the store; without --remove it
only looks.

Kept are runs that are not deleted in MLflow, as long as --keep-days says, those in progress, and every registered
version with all that it was made of. A run whose driver was killed stays RUNNING in MLflow; it counts as ended once it
has announced nothing for three days. Exit status: 0 done, 1 a removal failed half-way (the next one goes on), 2 bad
input. Rules and safety: `infra/artifacts/gc.py`.
"""

import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from infra.artifacts.announcements import Registered, RootReader
from infra.artifacts.gc import GcOutcome, execute, plan_collection
from infra.artifacts.gc_plan import GcPlan, summary
from infra.ending import message
from infra.errors import ConfigError
from infra.registry import runs
from infra.registry.roots import RunState, pipeline_runs, referred
from infra.store.admin import server_time
from infra.store.layout import RUNS, run_of
from infra.store.s3 import Store
from pipeline.collection.retention import ABANDONED_S, DAY_S, Rule, abandoned

_KINDS = {
    "artifact": "artifact",
    "orphan": "attempt without a manifest",
    "checkpoint": "saved training state",
    "lease": "lease",
    "upload": "unfinished upload",
    "run": "run's folder",
    "rows": "task rows",
    "base": "base",
    "probe": "probe of a check",
}
"""For people."""


def gc(keep_days: float | None, min_age_hours: float, forget_unknown_runs: bool, listed: bool, remove: bool) -> None:
    """Remove what no kept run and no registered version needs. Without --remove: only say what."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    rule = Rule(keep_days, min_age_hours * 3600, forget_unknown_runs)
    try:
        store = Store.from_env()
        if remove:
            store.check()  # which writes
        runs.check()
        roots = _roots(store, rule, console)
        plan = plan_collection(store, roots, rule.min_age_s)
    except Exception as error:
        _fail(console, error, 2)
    if plan.removals or plan.spared:
        console.print(plan_table(plan, store), highlight=False)
    console.print(plan_line(plan), highlight=False)
    if listed:
        for removal in plan.removals:
            console.print(f"{removal.kind} {removal.key} {size_text(removal.size)}", markup=False, highlight=False)
    if not remove:
        console.print("nothing was removed; --remove does it" if plan.removals else "nothing to remove")
        return
    try:
        console.print(outcome_line(execute(store, plan, roots)), highlight=False)
    except Exception as error:
        _fail(console, error, 1)


@dataclass
class Registry:
    """What MLflow says is to be kept, asked anew by every call, and what it said last."""

    store: Store
    rule: Rule
    runs: dict[str, RunState] = field(default_factory=dict)
    versions: int = 0
    abandoned: set[str] = field(default_factory=set)
    """Runs that count as ended although MLflow calls them running."""
    _heads: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self) -> Registered:
        """Raises FactoryError."""
        self.runs, versions = pipeline_runs(), referred(self.store, self._heads)
        self.versions, now = versions.versions, server_time(self.store).timestamp()
        keep = self.rule.keep(self.runs, now)

        def noted(run: str, announced_s: float) -> bool:
            if run in self.runs and abandoned(self.runs[run], announced_s, now):
                self.abandoned.add(run)
            return keep(run, announced_s)

        return Registered(noted, versions.keys, versions.attempts)


def _roots(store: Store, rule: Rule, console: Console) -> RootReader:
    """The store's roots by the rule; prints which runs and versions are kept. Raises FactoryError."""
    asked = Registry(store, rule)
    reader = RootReader(store, asked)
    found = reader()
    present = {run_of(name)[0] for name in store.list(RUNS)}
    if rule.forget_unknown and present and present.isdisjoint(asked.runs):
        raise ConfigError(
            f"the MLflow server at {runs.tracking_uri()} knows none of the {len(present)} runs in {store.uri('')}: "
            "is it another one's? correct MLFLOW_TRACKING_URI, or leave --forget-unknown-runs out"
        )
    kept = found.runs & present
    console.print(
        f"{asked.versions} registered versions are kept, and {len(kept)} of {len(present)} runs"
        f"{_reasons(present, kept, asked)}",
        highlight=False,
    )
    return reader


def _reasons(present: set[str], kept: frozenset[str], asked: Registry) -> str:
    """Why runs are not kept, how many are kept because MLflow does not know them, and how many have been abandoned."""
    gone, known, rule = present - kept, asked.runs, asked.rule
    deleted = sum(run in known and known[run].deleted for run in gone)
    unknown_gone, unknown_kept = sum(run not in known for run in gone), sum(run not in known for run in kept)
    days = ABANDONED_S / DAY_S
    old = len(gone) - deleted - unknown_gone
    parts = [
        (deleted, f"{deleted} deleted in MLflow"),
        (old, f"{old} ended more than {rule.keep_days:g} days ago" if rule.keep_days is not None else ""),
        (unknown_gone, f"{unknown_gone} unknown to MLflow"),
        (unknown_kept, f"{unknown_kept} of those kept are unknown to MLflow: --forget-unknown-runs lets them go"),
        (len(asked.abandoned), f"{len(asked.abandoned)} running in MLflow count as ended: silent for {days:g} days"),
    ]
    said = "; ".join(text for count, text in parts if count)
    return f" ({said})" if said else ""


def plan_table(plan: GcPlan, store: Store) -> Table:
    """What goes, and what nothing needs and yet stays."""
    table = Table(title=f"{store.uri('')} at {store.endpoint or 'the default AWS endpoint'}", title_justify="left")
    for title, side in (("", "left"), ("what", "left"), ("count", "right"), ("size", "right"), ("why", "left")):
        table.add_column(title, justify="right" if side == "right" else "left", no_wrap=title != "why")
    for line in summary(plan):
        what = _KINDS[line.kind] + (f": {line.what}" if line.what else "")
        why = line.reason or "nothing kept needs it"
        table.add_row("stays" if line.reason else "goes", what, str(line.count), size_text(line.size), why)
    return table


def plan_line(plan: GcPlan) -> str:
    """The plan in a sentence."""
    return f"{plan.kept} artifacts are needed and stay; {size_text(plan.size)} can be freed"


def outcome_line(outcome: GcOutcome) -> str:
    """What was done, in a sentence."""
    removed = ", ".join(f"{count} × {_KINDS[kind]}" for kind, count in outcome.removed.items() if count)
    more = [
        (outcome.skipped, f"{outcome.skipped} left alone: something changed meanwhile"),
        (outcome.restored, f"{outcome.restored} manifests put back"),
    ]
    said = "".join(f"; {text}" for count, text in more if count)
    return f"removed {removed or 'nothing'}; {size_text(outcome.size)} freed{said}"


def size_text(size: int) -> str:
    """Bytes with a unit of a thousand."""
    number, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} B" if units[0] == "B" else f"{number:.1f} {units[0]}"


def _fail(console: Console, error: Exception, status: int) -> None:
    console.print(f"error: {message(error)}", style="bold red", markup=False, highlight=False)
    sys.exit(status)
