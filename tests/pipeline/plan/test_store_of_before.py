"""A store that an earlier version wrote is found in full: keys, digests, formats and names have not moved.

`before/` is what the tiny suite in it left in its store at the commit 27daf7e. What has been given a new version since
is named here; nothing else may be missing.
"""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from infra.artifacts.snapshot import Snapshot
from infra.store.s3 import Store
from pipeline.config.model import load_config
from pipeline.flow.rehearse import forecast
from pipeline.plan.preflight import prepare_inputs
from workers.base.identity import contents_identity

BEFORE = Path(__file__).with_name("before")


def test_nothing_is_made_again(store_in_memory: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    base.mkdir()
    with tarfile.open(BEFORE / "store.tar.xz") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            store_in_memory.put(member.name, data)
            if member.name.startswith("bases/"):
                (base / Path(member.name).name).write_bytes(data)
    text = (BEFORE / "config.yaml").read_text(encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("{here}", str(BEFORE)).replace("{base}", str(base)), encoding="utf-8")
    prepared = prepare_inputs(load_config(config), store_in_memory, Console(quiet=True))
    # Since then a base's settings are part of its identity, which moved those of folders once.
    then = replace(prepared.base, sha256=contents_identity(prepared.base.path))
    counts = forecast(replace(prepared, base=then).inputs("run"), Snapshot(store_in_memory), {}).counts
    assert {kind: count.make for kind, count in counts.items() if count.make} == {
        # since then an option is scored up to its end (SCORING_VERSION 2), and texts by other words (METRIC_VERSIONS)
        "evaluations": counts["evaluations"].make,
        "registrations": counts["registrations"].make,
    }
    found = {kind: counts[kind].reuse for kind in ("experts", "importances", "merge_nodes", "merges", "task_masks")}
    assert found == {"experts": 2, "importances": 4, "merge_nodes": 4, "merges": 8, "task_masks": 2}
