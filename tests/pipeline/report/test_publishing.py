"""What a run publishes when the disk, or a service, takes none of it."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from infra.errors import RegistryError
from pipeline.report import publishing

FULL = OSError(28, "No space left on device")


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[str, list[str], dict[str, bytes]]]:
    """Publishes to a folder; returns what is printed, what MLflow is asked for, and what is stored."""
    asked: list[str] = []
    stored: dict[str, bytes] = {}
    for name in ("log_folder", "log_history", "set_tags", "describe_run"):
        monkeypatch.setattr(publishing.runs, name, lambda *_, _name=name: asked.append(_name))
    for name in ("run_page", "run_path"):
        monkeypatch.setattr(publishing.runs, name, lambda run: run)
    empty: dict[str, Any] = {
        "_curves": lambda results: {}, "candidates_csv": lambda results: "",
        "dump_config": lambda config: "", "report_markdown": lambda results, pictures: "# report",
        "summary_table": lambda results: "the table", "summary_lines": lambda results: ["a line"],
    }  # fmt: skip
    for name, made in empty.items():
        monkeypatch.setattr(publishing, name, made)
    monkeypatch.setattr(publishing.plots, "draw", lambda *_: {"scores.png": b"png"})
    monkeypatch.setattr(publishing.training_rows, "draw", lambda *_: {})
    for name in ("metrics", "tags", "description"):
        monkeypatch.setattr(publishing.mlflow_page, name, lambda *_: {})
    store = SimpleNamespace(put=stored.__setitem__, uri=lambda name: f"s3://bucket/{name}")

    def call(folder: Path) -> tuple[str, list[str], dict[str, bytes]]:
        out = io.StringIO()
        console = Console(file=out, width=200)
        results: Any = SimpleNamespace(suite="s", to_json=lambda: "{}")
        publishing.publish_report(store, None, "run", results, folder, console)  # type: ignore[arg-type]
        return out.getvalue(), asked, stored

    return call


ALL = ["log_folder", "log_history", "set_tags", "describe_run"]


def test_all_of_it(publish: Any, tmp_path: Path) -> None:
    printed, asked, stored = publish(tmp_path / "report")
    assert asked == ALL
    assert {f"runs/run/{path.name}" for path in (tmp_path / "report").iterdir()} == set(stored)
    assert "warning" not in printed


@pytest.mark.parametrize("name", ["results.json", "report.html", "scores.png"])
def test_a_full_disk_costs_only_the_report(publish: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    printed, asked, stored = publish(tmp_path)
    assert asked == ALL
    assert len(stored) == 6
    assert "the table" in printed
    assert f"the report in {tmp_path}/ is not complete (No space left on device); the whole report is at" in printed
    assert not (tmp_path / name).exists()


def test_so_does_a_full_temporary_folder(publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FULL

    monkeypatch.setattr(publishing.tempfile, "TemporaryDirectory", full)
    printed, asked, _ = publish(tmp_path)
    assert asked == ALL[1:]
    assert "the run's page in MLflow has no report (No space left on device)" in printed


def test_scores_are_printed_before_mlflow_is_asked(
    publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: Any) -> None:
        raise RegistryError("gone")

    seen: list[str] = []
    monkeypatch.setattr(publishing, "summary_table", lambda results: seen.append("table") or "the table")
    monkeypatch.setattr(publishing.runs, "log_folder", gone)
    with pytest.raises(RegistryError, match="gone"):
        publish(tmp_path)
    assert seen == ["table"]
    assert (tmp_path / "report.html").is_file()
