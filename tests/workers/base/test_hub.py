"""Repositories of the hub: which commit is read, that a newer one is asked for, and which files are fetched."""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from infra.errors import BaseModelError
from workers.base.downloads import HUB_WEIGHTS, fetch_hub
from workers.base.prepare import prepare_base

FILES = ("config.json", "tokenizer.json", "model.safetensors", "consolidated.safetensors", "original/model.safetensors")


class Hub:
    """A repository of commits, each with one number for weights; `down` where it cannot be asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.newest, self.down = folder, "a" * 40, False
        self.fetched: list[str] = []
        self.files = FILES

    def model_info(self, repo: str, revision: str | None = None, **_: Any) -> Any:
        if self.down:
            raise ConnectionError("no route")
        return SimpleNamespace(sha=self.newest)

    def snapshot_download(self, repo: str, revision: str | None = None, allow_patterns: Any = (), **_: Any) -> str:
        if self.down:
            raise ConnectionError("no route")
        commit = revision or self.newest
        folder = self.folder / commit
        for name in self.files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                self.fetched.append(name)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if name.endswith(".safetensors"):
                    save_file({"w": torch.full((2,), float(int(commit[0], 16)))}, folder / name)
                else:
                    (folder / name).write_text("{}")
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., str]:
    return lambda source="hub:team/model": prepare_base(source, tmp_path / "cache").sha256


def test_a_newer_commit_is_asked_for_and_told(
    hub: Hub, prepare: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare()
    assert f"hub:team/model: commit {'a' * 40}\n" in capsys.readouterr().err
    fetched = len(hub.fetched)
    assert prepare() == first
    assert len(hub.fetched) == fetched  # nothing again
    hub.newest = "b" * 40
    assert prepare() != first
    assert f"commit {'b' * 40}, it was {'a' * 12} before" in capsys.readouterr().err
    assert prepare(f"hub:team/model@{'a' * 40}") == first
    assert capsys.readouterr().err == ""  # it was said


def test_without_the_hub_the_last_commit_stands_and_is_told(
    hub: Hub, prepare: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.down = True
    with pytest.raises(BaseModelError, match=r"base hub:team/model: cannot be fetched.*no route"):
        prepare()
    hub.down = False
    first = prepare()
    hub.down, hub.newest = True, "b" * 40
    assert prepare() == first
    assert f"commit {'a' * 40} (the hub cannot be asked: ConnectionError)" in capsys.readouterr().err


def test_copies_for_other_programs_are_not_fetched(hub: Hub, prepare: Callable[..., str]) -> None:
    prepare()
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_shards_of_any_name_are_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = ("model.safetensors.index.json", "weights-1.safetensors", "other.safetensors")
    index = hub.folder / ("a" * 40) / "model.safetensors.index.json"
    index.parent.mkdir(parents=True)
    found = hub.snapshot_download

    def with_index(*arguments: Any, **named: Any) -> str:
        folder = found(*arguments, **named)
        index.write_text(json.dumps({"weight_map": {"w": "weights-1.safetensors"}}))
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", with_index)
    folder = fetch_hub("team/model", HUB_WEIGHTS)
    assert (folder / "weights-1.safetensors").is_file()
    assert not (folder / "other.safetensors").exists()
