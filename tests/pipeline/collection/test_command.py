"""What a collection asks MLflow, and what it says of it; whole collections are in tests/e2e."""

import io
import uuid
from datetime import timedelta

import pytest
from click.testing import CliRunner
from rich.console import Console

from infra.artifacts.announcements import announce
from infra.registry import runs
from infra.registry.models import RegisteredAdapter, register
from infra.stack.services import StackState
from infra.store.admin import server_time
from infra.store.s3 import Store
from pipeline.collection import command
from pipeline.collection.retention import DAY_S, Rule
from pipeline.commands.gc import gc


def roots_of(store: Store, rule: Rule) -> tuple[command.RootReader, str]:
    """The reader, and what was printed."""
    console = Console(file=io.StringIO(), soft_wrap=True, width=120)
    reader = command._roots(store, rule, console)
    return reader, console.file.getvalue()  # type: ignore[attr-defined]


def test_without_remove_it_only_looks(store: Store, stack: StackState, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be run with credentials that cannot write."""
    monkeypatch.setenv("FACTORY_S3_PREFIX", store.prefix)
    for write in ("put", "put_if_absent", "replace_if_match", "delete", "check"):
        monkeypatch.setattr(Store, write, None)
    done = CliRunner().invoke(gc, [])
    assert done.exit_code == 0, done.output
    assert "nothing to remove" in done.output
    assert CliRunner().invoke(gc, ["--remove"]).exception is not None


def test_a_version_registered_and_a_run_finished_meanwhile_are_seen(store: Store, stack: StackState) -> None:
    run = runs.start_run("gc-command", "run", {"kind": "pipeline"}, {})
    reader, _ = roots_of(store, Rule(keep_days=30))
    task, key, base = uuid.uuid4().hex, uuid.uuid4().hex * 2, uuid.uuid4().hex * 2
    model = RegisteredAdapter(
        name=runs.model_name("gc-command", task), task=task, key=key, digest=uuid.uuid4().hex * 2,
        adapter_uri=store.uri(f"objects/{key}/a/adapter"), base_sha256=base, base_name="tiny",
        prompt_wrapper="{prompt}", prompt_template="{input}", max_new_tokens=4, dtype="float32", run_id=run,
        description="For tests.",
    )  # fmt: skip
    register(model)
    announce(store, run, {"later"})
    found = reader()
    assert {key, base, "later"} <= found.keys
    assert f"objects/{key}/a" in found.attempts
    assert run in found.runs


def test_a_run_whose_driver_was_killed_ends_after_days_of_silence(
    store: Store, stack: StackState, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.start_run("gc-command", "killed", {"kind": "pipeline"}, {})
    announce(store, run, {"a"})
    now = server_time(store)

    def after(days: float) -> tuple[bool, str]:
        later = now + timedelta(seconds=days * DAY_S)
        for module in ("pipeline.collection.command", "infra.artifacts.announcements"):
            monkeypatch.setattr(f"{module}.server_time", lambda _: later)
        reader, text = roots_of(store, Rule(keep_days=0))
        return run in reader().runs, text

    kept, text = after(2.5)
    assert kept
    assert "silent" not in text
    kept, text = after(3.5)
    assert not kept
    assert "1 running in MLflow count as ended: silent for 3 days" in text
