"""What a merge by hand cannot merge is refused by name before a tensor is merged; what it ignores is told."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from merge.by_hand.sources import name_of, split_expert
from merge.commands import main
from tests.e2e.conftest import write_tiny_base

Q = "model.layers.0.self_attn.q_proj"
TABLE = "model.embed_tokens.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a tiny base, with a cache of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FACTORY_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield write_tiny_base(tmp_path_factory.mktemp("base") / "model")
    patch.undo()


@pytest.fixture
def expert(tmp_path: Path, model: Path) -> Path:
    """A fine-tuned checkpoint of the base."""
    folder = tmp_path / "expert"
    shutil.copytree(model, folder)
    change(folder, {f"{Q}.weight": lambda weight: weight + 0.25})
    return folder


def change(folder: Path, tensors: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> None:
    found = load_file(folder / WEIGHTS)
    save_file(found | {name: make(found[name]) for name, make in tensors.items()}, folder / WEIGHTS)


def add(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS)


def edit(file: Path, **fields: Any) -> None:
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(old | fields))


def permute(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    by_id = {at: token for token, at in vocabulary.items()}
    content["model"]["vocab"] = {by_id[299 - at] if 100 <= at < 200 else by_id[at]: at for at in by_id}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def peft(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    factors = {"lora_A.weight": torch.ones(2, 64), "lora_B.weight": torch.ones(64, 2)}
    save_file({f"base_model.model.{Q}.{name}": factor for name, factor in factors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    edit(folder / "adapter_config.json", peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj"], **config)
    return folder


def plan(model: Path, *arguments: object) -> Result:
    words = ["plan", "--base", f"path:{model}", "--method", "mean", "--out", "merged.safetensors", *arguments]
    return CliRunner().invoke(main, [str(word) for word in words])


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "quantised, by its configuration": (
        lambda e: edit(e / "config.json", quantization_config={"quant_method": "gptq"}), "is quantised (gptq in",
    ),
    "quantised, by integer weights": (
        lambda e: change(e, {f"{Q}.weight": lambda w: w.to(torch.int8)}), f"is quantised ({Q}.weight is int8",
    ),
    "quantised, by scales beside weights": (
        lambda e: add(e, **{f"{Q}.SCB": torch.ones(64)}), f"is quantised (it holds {Q}.SCB",
    ),
    "quantised, by fp8 weights": (
        lambda e: change(e, {f"{Q}.weight": lambda w: w.to(torch.float8_e4m3fn)}), "is a type of quantised weights",
    ),
    "another tokenizer": (permute, "its tokenizer gives 100 of the base's tokens other ids"),
    "a larger vocabulary": (
        lambda e: change(e, {TABLE: lambda w: torch.cat([w, w[:8]])}), "8 more rows, tokens were added",
    ),
    "a head of its own on a tied base": (
        lambda e: add(e, **{"lm_head.weight": torch.ones(259, 64)}), f"lm_head.weight differs from {TABLE}, which",
    ),
    "a smaller vocabulary": (lambda e: change(e, {TABLE: lambda w: w[:-8].clone()}), "8 fewer rows, tokens were taken"),
}  # fmt: skip
"""Case: what is done to a fine-tuned checkpoint, and what is said."""


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_that_no_merge_takes(model: Path, expert: Path, case: str) -> None:
    spoil, message = REFUSED[case]
    spoil(expert)
    result = plan(model, "--expert", f"a={expert}")
    said = " ".join(result.output.split())
    assert result.exit_code == 2, said
    assert said.startswith("Error: expert 'a'")
    assert message in said


@pytest.mark.parametrize("case", ["quantised, by its configuration", "quantised, by integer weights"])
def test_a_quantised_base_is_refused(tmp_path: Path, model: Path, case: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(model, base)
    change(base, {f"{Q}.weight": lambda weight: weight + 1})  # another base than the one that is cached
    REFUSED[case][0](base)
    adapter = peft(tmp_path / "lora")
    result = plan(base, "--expert", f"a={adapter}")
    assert result.exit_code == 2
    assert "quantised" in result.output
    words = ["export", str(adapter), "--base", f"path:{base}", "--out", str(tmp_path / "full")]
    exported = CliRunner().invoke(main, words)
    assert exported.exit_code == 2
    assert "quantised" in exported.output


def test_what_is_ignored_is_told(tmp_path: Path, model: Path, expert: Path) -> None:
    (expert / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{% endfor %}")
    edit(expert / "generation_config.json", eos_token_id=40)
    edit(expert / "config.json", rms_norm_eps=0.5)
    shutil.copy(expert / WEIGHTS, expert / "model-00001-of-00003.safetensors")
    adapter = peft(tmp_path / "lora", base_model_name_or_path="someone/another-7b")
    result = plan(model, "--expert", f"a={expert}", "--expert", f"b={adapter}")
    assert result.exit_code == 0, result.output
    notices = [line for line in result.output.splitlines() if line.startswith("notice: ")]
    assert [line.split(":")[1] for line in notices] == [" expert 'a'"] * 4 + [" expert 'b'"]
    words = ("chat template", "eos_token_id 40", "rms_norm_eps 0.5", "model-00001-of-00003", "someone/another-7b")
    for line, word in zip(notices, words, strict=True):
        assert word in line


def test_nothing_is_told_of_an_expert_that_is_the_bases(model: Path, expert: Path) -> None:
    result = plan(model, "--expert", f"a={expert}")
    assert result.exit_code == 0, result.output
    assert "notice" not in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts:\n  a: one\n  a: two\n", "'a' stands twice in one mapping, in lines 2 and 3"),
        ("method: mean\nexperts: [x]\nmethod: ties\n", "'method' stands twice in one mapping, in lines 1 and 3"),
        ("experts: {1: one, '1': two}\n", "'1' stands twice"),
        ("experts: {a: one}\nweights: {a: 1, a: 2}\n", "'a' stands twice"),
    ],
)
def test_a_key_twice_is_refused(tmp_path: Path, model: Path, text: str, message: str) -> None:
    (tmp_path / "merge.yaml").write_text(text)
    result = plan(model, "--config", tmp_path / "merge.yaml")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_the_hub_is_a_source(tmp_path: Path, model: Path, expert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_expert("a=hub:user/lora@v1") == ("a", "hub:user/lora@v1")
    assert name_of("hub:user/lora@v1") == "lora"
    repositories = {"user/lora": peft(tmp_path / "lora"), "user/tuned": expert, "user/data": tmp_path / "data"}
    repositories["user/data"].mkdir()

    def download(repo: str, revision: str | None = None, allow_patterns: Any = (), **_: Any) -> str:
        assert revision == "a" * 40
        return str(repositories[repo])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(sha="a" * 40))
    )
    result = plan(model, "--expert", "hub:user/lora", "--expert", "hub:user/tuned@main")
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("peft", "checkpoint", "hub:user/lora", "a" * 40))
    refused = plan(model, "--expert", "hub:user/data")
    assert refused.exit_code == 2
    assert "has neither adapter_config.json nor config.json" in " ".join(refused.output.split())
