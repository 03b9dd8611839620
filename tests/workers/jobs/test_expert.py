"""A worker that is lost in the middle of an expert: the next one goes on from the saved state, to the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.artifacts.manifests import Recipe, find
from infra.errors import RegistryError
from infra.registry import runs
from infra.store.layout import rows_name
from infra.store.s3 import Store
from tests.workers.tiny import tiny_model, tiny_tokenizer
from workers.base.prepare import prepare_base, upload_base
from workers.jobs.expert import TRAINING_LOSS, ExpertJob, make_expert
from workers.jobs.resume import drop_checkpoint, find_checkpoint
from workers.masks.spec import MaskSpec
from workers.text.prompt import PromptSpec
from workers.text.rows import Row, fingerprint, rows_to_jsonl
from workers.training.kinds import FullSpec, LoraSpec
from workers.training.loop import StepReport, TrainSpec

ROOT = Path(__file__).resolve().parents[3]
MODULES = r".*\.(v_proj|up_proj)"
KINDS = {
    "sparse": MaskSpec("connection_sensitivity", "element", 0.2, modules=MODULES, reselect_every=3),
    "lora": LoraSpec(MODULES, rank=4, alpha=8, dropout=0.1),
    "full": FullSpec(MODULES),
}
SPEC = TrainSpec(12, 4, 0.02, 0.0, 0.1, "linear", 1.0, 3, 5)
INTERRUPTED = 8


def job(kind: str, base: str) -> ExpertJob:
    rows = [Row(str(i), f"w{i}w{(7 * i) % 50}", (f"w{i % 3}",)) for i in range(24)]
    names = [rows_name(fingerprint(part)) for part in (rows[:16], rows[16:])]
    expert = KINDS[kind]
    return ExpertJob(
        task=kind, recipe=Recipe("expert", 1, {"kind": kind}), base_sha256=base, train_rows=names[0],
        validation_rows=names[1], prompt=PromptSpec("{input}?", "<s>{prompt}</s>"), max_target_tokens=8, labels=None,
        expert=expert, train=SPEC, support=None, compute_dtype="float32", value_dtype="float32", recompute=False,
        save_every=2, deterministic=kind == "sparse", experiment="resume", parent_run_id=os.environ["PARENT_RUN"],
        tags={},
    )  # fmt: skip


def fill(store: Store, folder: Path) -> str:
    """Put base and rows into the store; the base's identity."""
    tiny_model(tied=False).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    base = prepare_base(f"path:{folder}", Path(os.environ["FACTORY_CACHE"]))
    upload_base(store, base)
    rows = [Row(str(i), f"w{i}w{(7 * i) % 50}", (f"w{i % 3}",)) for i in range(24)]
    for part in (rows[:16], rows[16:]):
        store.put_if_absent(rows_name(fingerprint(part)), rows_to_jsonl(part))
    return base.sha256


def work(prefix: str, kind: str, base: str) -> None:
    """In a process of its own: train, and wait for ever at the step where the parent kills it."""

    def on_step(report: StepReport) -> None:
        if report.step == INTERRUPTED + 1:
            print("waiting", flush=True)
            signal.pause()

    store = Store(os.environ["FACTORY_S3_BUCKET"], os.environ["FACTORY_S3_ENDPOINT"], prefix)
    make_expert(store, job(kind, base), ["cpu"], 1, on_step)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_worker_costs_only_the_steps_since_its_last_state(
    store: Store, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PARENT_RUN", runs.start_run("resume", "parent", {}, {}))
    base = fill(store, tmp_path / "base")
    script = f"from tests.workers.jobs.test_expert import work; work({store.prefix!r}, {kind!r}, {base!r})"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGKILL)
    mine = job(kind, base)
    saved = find_checkpoint(store, mine.recipe.key)
    assert saved is not None
    assert saved.step == INTERRUPTED
    threads = torch.get_num_threads()
    resumed: list[StepReport] = []
    made = [make_expert(store, mine, ["cpu"], 1, resumed.append)]
    assert [report.step for report in resumed] == list(range(INTERRUPTED + 1, SPEC.steps + 1))
    assert made[0][0].meta["resumed_after"] == INTERRUPTED
    assert find_checkpoint(store, mine.recipe.key) is None
    assert not list(store.list("checkpoints/"))
    other = Store(store.bucket, store.endpoint, f"{store.prefix}-whole")
    fill(other, tmp_path / "base")
    made.append(make_expert(other, mine, ["cpu"], 1, lambda report: None))
    torch.set_num_threads(threads)
    assert made[1][0].meta["resumed_after"] == 0
    assert made[0][0].digest == made[1][0].digest


@pytest.mark.parametrize("away", ["for a while", "to the end"])
def test_an_mlflow_that_does_not_answer_costs_no_training(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, away: str
) -> None:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PARENT_RUN", runs.start_run("outage", "parent", {}, {}))
    calls, history = [0], runs.log_history

    def gone(*_: Any) -> None:
        raise RegistryError("MLflow does not answer")

    def log_history(run_id: str, rows: list[dict[str, Any]]) -> None:
        calls[0] += 1
        if away == "to the end" or calls[0] == 1:
            gone()
        history(run_id, rows)

    monkeypatch.setattr(runs, "log_history", log_history)
    if away == "to the end":
        for name in ("set_tags", "finish_run"):
            monkeypatch.setattr(runs, name, gone)
    mine, threads = job("full", fill(store, tmp_path / "base")), torch.get_num_threads()
    manifest, made = make_expert(store, mine, ["cpu"], 1, lambda report: None)
    torch.set_num_threads(threads)
    assert made
    assert find(store, mine.recipe.key, {}) == manifest
    assert ("does not have all of its curves" in caplog.text) == (away == "to the end")
    run = runs.client().get_run(manifest.meta["run_id"])
    assert ({TRAINING_LOSS, "result/best_step"} <= set(run.data.metrics)) == (away == "for a while")


def test_a_state_that_cannot_be_read_is_ignored(store: Store) -> None:
    def point(body: dict[str, Any]) -> None:
        store.put(f"checkpoints/{'1' * 64}.json", json.dumps(body).encode())

    point({"name": "checkpoints/gone", "sha256": "0" * 64, "size": 3})
    assert find_checkpoint(store, "1" * 64) is None
    store.put("checkpoints/other", b"abc")
    point({"name": "checkpoints/other", "sha256": "0" * 64, "size": 3})
    assert find_checkpoint(store, "1" * 64) is None
    point({"not": "a pointer"})
    assert find_checkpoint(store, "1" * 64) is None
    drop_checkpoint(store, "1" * 64)
