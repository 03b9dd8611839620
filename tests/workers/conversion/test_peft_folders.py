"""PEFT folders as people have them, and merges of LoRA adapters as LoRA again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import AdapterError, BaseModelError
from tests.workers.tiny import tiny_base
from workers.adapters.support import SparseTensor
from workers.adapters.writer import AdapterMeta, AdapterReader, LowRank, save_adapter
from workers.base.layout import BaseLayout
from workers.conversion.formats import from_checkpoint, from_peft, to_peft
from workers.conversion.peft import other_base
from workers.tensors.source import FileSource

P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
TABLE = "model.embed_tokens.weight"
HEAD = "lm_head"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseLayout:
    return tiny_base(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def table(base: BaseLayout) -> torch.Tensor:
    return load_file(base.path / "model.safetensors")[TABLE]


def lora(module: str, out: int, inner: int = 32) -> dict[str, torch.Tensor]:
    return {f"{P}{module}.lora_A.weight": torch.ones(2, inner), f"{P}{module}.lora_B.weight": torch.ones(out, 2)}


def folder(path: Path, more: dict[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(lora(Q, 32) | more, path / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (path / "adapter_config.json").write_text(json.dumps(given))
    return path


@pytest.mark.parametrize("key", [TABLE, "model.embed_tokens.base_layer.weight", "lm_head.weight",
                                 "model.embed_tokens.modules_to_save.default.weight"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_the_base_that_were_saved_along_are_ignored(
    tmp_path: Path, base: BaseLayout, table: torch.Tensor, key: str, dtype: torch.dtype
) -> None:
    given = folder(tmp_path / "peft", {P + key: table.to(dtype)}, modules_to_save=["lm_head", "embed_tokens"])
    (line,) = from_peft(given, base, tmp_path / "a")
    assert line.endswith("equal the base's and are ignored")
    reader = AdapterReader(FileSource(tmp_path / "a"))
    assert (reader.names, reader.head_names) == ([f"{Q}.weight"], [])


def _tables(rows: int) -> dict[str, torch.Tensor]:
    return {P + TABLE: torch.zeros(rows, 32)}


REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "LoRA on a tied head": (lora(HEAD, 88), "lm_head.weight is tied to model.embed_tokens.weight in this base"),
    "a tied head trained": ({f"{P}lm_head.weight": torch.zeros(88, 32)}, "trains a tensor of the base as a whole"),
    "LoRA on embeddings": (
        {f"{P}model.embed_tokens.lora_embedding_A": torch.ones(2, 88)}, "is LoRA on an embedding table",
    ),
    "LoRA of linear form on embeddings": (lora("model.embed_tokens", 88), "is an embedding, not a linear layer's"),
    "embeddings trained": (_tables(88), "trains a tensor of the base as a whole"),
    "a larger vocabulary": (_tables(96), r"has 96 rows, the base's has 88: 8 more rows, tokens were added"),
    "a smaller vocabulary": (_tables(80), r"8 fewer rows, tokens were taken away"),
}  # fmt: skip
"""Case: tensors beside a LoRA of a linear layer, and what is said."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_delta_of_linear_layers_holds(tmp_path: Path, base: BaseLayout, case: str) -> None:
    rows = base.shapes[TABLE][0]
    assert rows == 88, rows
    tensors, message = REFUSED[case]
    given = folder(tmp_path / "peft", tensors, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=message) as caught:
        from_peft(given, base, tmp_path / "a")
    assert "another base" not in str(caught.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("given", "names", "other"),
    [
        ("someone/other-7b", {"model"}, "someone/other-7b"),
        ("someone/Model", {"model"}, None),
        ("/home/x/models/model/", {"team/model@main"}, None),
        ("C:\\models\\model", {"model"}, None),
        ("", {"model"}, None),
        (None, {"model"}, None),
        ("other", {"model", "/data/other"}, None),
    ],
)
def test_the_base_that_a_folder_says_it_was_made_for(
    tmp_path: Path, given: str | None, names: set[str], other: str | None
) -> None:
    assert other_base(folder(tmp_path, {}, base_model_name_or_path=given), names) == other


def test_notices_of_a_folder(tmp_path: Path, base: BaseLayout) -> None:
    given = folder(tmp_path / "peft", {}, base_model_name_or_path="someone/other-7b", revision="v2")
    (given / "chat_template.jinja").write_text("{{ other }}")
    template, name = from_peft(given, base, tmp_path / "a", names={"model"})
    assert "another chat template" in template
    assert "was made for someone/other-7b@v2, this base is model" in name
    swapped = json.loads((base.path / "tokenizer.json").read_text())
    swapped["model"]["vocab"] |= {"w1": swapped["model"]["vocab"]["w2"], "w2": swapped["model"]["vocab"]["w1"]}
    (given / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(BaseModelError, match="gives 2 of the base's tokens other ids"):
        from_peft(given, base, tmp_path / "a")


def test_checkpoints_that_are_refused_or_told_of(tmp_path: Path, base: BaseLayout) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(base.path, tuned)
    tensors = load_file(base.path / "model.safetensors")
    save_file(tensors | {f"{Q}.weight": tensors[f"{Q}.weight"] + 1}, tuned / "model.safetensors")
    (tuned / "chat_template.jinja").write_text("{{ other }}")
    (line,) = from_checkpoint(tuned, base, 0.5, tmp_path / "a")
    assert "another chat template" in line
    save_file(tensors | {TABLE: torch.cat([tensors[TABLE], torch.ones(8, 32)])}, tuned / "model.safetensors")
    with pytest.raises(BaseModelError, match="8 more rows, tokens were added"):
        from_checkpoint(tuned, base, 0.5, tmp_path / "b", every_tensor=True)
    (tuned / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(BaseModelError, match=r"is quantised \(gptq"):
        from_checkpoint(tuned, base, 0.5, tmp_path / "b", every_tensor=True)
    assert not (tmp_path / "b").exists()


# -- LoRA again --


def merged(tmp_path: Path, base: BaseLayout, noise: float = 0.0) -> tuple[Path, torch.Tensor]:
    """The mean of two LoRA adapters of rank 2, as a merge writes it: dense."""
    g = torch.Generator().manual_seed(0)
    deltas = [torch.randn(32, 2, generator=g) @ torch.randn(2, 32, generator=g) for _ in range(2)]
    mean = (deltas[0] + deltas[1]) / 2 + noise * torch.randn(32, 32, generator=g)
    tensor = SparseTensor((32, 32), torch.arange(1024), mean.reshape(-1))
    save_adapter(tmp_path / "m", {f"{Q}.weight": tensor}, AdapterMeta(base.sha256, "full"), torch.float32)
    return tmp_path / "m", mean


def read_back(tmp_path: Path, base: BaseLayout) -> LowRank:
    from_peft(tmp_path / "peft", base, tmp_path / "back")
    found = AdapterReader(FileSource(tmp_path / "back")).low_rank(f"{Q}.weight")
    assert found is not None
    return found


def test_a_linear_merge_of_lora_adapters_is_lora_again(tmp_path: Path, base: BaseLayout) -> None:
    file, mean = merged(tmp_path, base)
    (line,) = to_peft(file, base, tmp_path / "peft")
    assert "LoRA of rank 4 at most, exact up to rounding" in line
    found = read_back(tmp_path, base)
    assert found.rank == 4
    torch.testing.assert_close(found.scale * found.b @ found.a, mean, rtol=1e-4, atol=1e-5)


def test_another_rank_on_request_and_its_error(tmp_path: Path, base: BaseLayout) -> None:
    file, noisy = merged(tmp_path, base, noise=0.1)
    with pytest.raises(AdapterError, match="give --rank for the nearest LoRA"):
        to_peft(file, base, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    (line,) = to_peft(file, base, tmp_path / "peft", rank=3)
    found = read_back(tmp_path, base)
    assert found.rank == 3
    lost = float((found.scale * found.b @ found.a - noisy).norm() / noisy.norm())
    assert f"rank 3 at most, the nearest of that rank: {lost:.2g} of" in line
    with pytest.raises(AdapterError, match="rank 0"):
        to_peft(file, base, tmp_path / "peft", rank=0)
