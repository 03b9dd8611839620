"""A run that is stopped, or fails, before and after the work itself: MLflow is told in every case."""

import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from infra.errors import RegistryError
from pipeline.running import driver
from pipeline.running.in_process import ThisProcess
from pipeline.running.signals import on_signals


def test_signals_are_handled_inside_the_block_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    heard: list[int] = []
    with on_signals(lambda number, frame: heard.append(number)):
        os.kill(os.getpid(), signal.SIGTERM)
        with on_signals(signal.SIG_IGN):
            os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("raised", "status"),
    [(KeyboardInterrupt(), "KILLED"), (RegistryError("gone"), "FAILED"), (KeyError("x"), "FAILED")],
)
def test_a_start_that_is_broken_off_leaves_no_run_running(
    raised: BaseException, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[str, str]] = []

    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(driver.runs, "start_run", lambda *_: "run")
    monkeypatch.setattr(driver.runs, "log_text", fail)
    monkeypatch.setattr(driver.runs, "finish_run", lambda *call: ended.append(call))
    monkeypatch.setattr(driver, "dump_config", lambda config: "")
    prepared: Any = SimpleNamespace(config=SimpleNamespace(suite="suite"), parameters=dict)
    with pytest.raises(type(raised)):
        driver.start_run(prepared)
    assert ended == [("run", status)]


@pytest.mark.parametrize(
    ("raised", "code", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "KILLED", "stopped"),
        (RegistryError("gone"), 1, "FAILED", "error: gone"),
        (KeyError("x"), 1, "FAILED", "error: KeyError: 'x' (unexpected; the traceback is in"),
    ],
)
def test_what_ends_a_run_outside_its_work(
    raised: BaseException, code: int, status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here while it announces itself, so before anything is made."""
    calls: dict[str, list[Any]] = {"finish_run": [], "describe_run": [], "kill_running_children": [], "log_text": []}
    for name, seen in calls.items():
        monkeypatch.setattr(driver.runs, name, lambda *call, _seen=seen: _seen.append(call))
    monkeypatch.setattr(driver.runs, "run_page", lambda run: run)

    def announcements(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(driver, "Announcements", announcements)
    printed: list[str] = []
    console: Any = SimpleNamespace(print=lambda text, **_: printed.append(text))
    prepared: Any = SimpleNamespace(
        config=SimpleNamespace(suite="suite", seeds=None, seed=0), replicates=lambda run: [], store=None
    )
    assert driver.run(prepared, "run", 1, ThisProcess(), threading.Event(), None, console) == code
    assert calls["finish_run"] == [("run", status)]
    assert calls["kill_running_children"] == [("run",)]
    assert printed[-1].startswith(said)
    assert bool(calls["describe_run"]) == (code == 1)
    assert [call[2] for call in calls["log_text"]] == (["report/traceback.txt"] if "unexpected" in said else [])
