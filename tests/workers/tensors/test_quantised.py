"""Quantised checkpoints are refused by what shows it: configuration, names, types. Others are not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infra.errors import BaseModelError, TensorFileError
from workers.tensors.checkpoint import CheckpointFiles
from workers.tensors.quantised import read_settings, refuse_quantised

W = "model.layers.0.mlp.up_proj"
PLAIN = {f"{W}.weight": torch.ones(4, 4)}
INT8 = {f"{W}.weight": torch.ones(4, 4, dtype=torch.int8)}

QUANTISED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "configuration": ({"quantization_config": {"quant_method": "gptq"}}, PLAIN, "gptq in config.json"),
    "configuration without a method": ({"quantization_config": {"bits": 4}}, PLAIN, "quantization_config in"),
    "language part of a composite": ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, PLAIN, "awq"),
    "compressed-tensors": ({"compression_config": {"quant_method": "compressed-tensors"}}, PLAIN, "compressed-tensors"),
    "int8": ({}, INT8, f"{W}.weight is int8"),
    "bitsandbytes int8": ({}, INT8 | {f"{W}.SCB": torch.ones(4)}, f"it holds {W}.SCB"),
    "bitsandbytes nf4": ({}, {f"{W}.weight.absmax": torch.ones(4)}, "absmax"),
    "bitsandbytes state": ({}, {f"{W}.weight.quant_state.bitsandbytes__nf4": torch.ones(4)}, "quant_state"),
    "gptq, awq": ({}, {f"{W}.qweight": torch.ones(4, dtype=torch.int32)}, f"{W}.qweight"),
    "packed": ({}, {f"{W}.weight_packed": torch.ones(4, dtype=torch.int32)}, "weight_packed"),
    "scales of fp8": ({}, PLAIN | {f"{W}.weight_scale_inv": torch.ones(1, 1)}, "weight_scale_inv"),
    "hqq": ({}, {f"{W}.W_q": torch.ones(4, 4, dtype=torch.uint8)}, f"{W}.W_q"),
    "eetq": ({}, PLAIN | {f"{W}.weight_scales": torch.ones(4)}, "weight_scales"),
    "fp8, scaled inputs": ({}, PLAIN | {f"{W}.input_scale": torch.ones(1)}, "input_scale"),
    "mxfp4": ({}, {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.ones(4, dtype=torch.uint8)}, "_blocks"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_checkpoints_are_refused(tmp_path: Path, case: str) -> None:
    settings, tensors, message = QUANTISED[case]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"^e: is quantised") as caught:
        refuse_quantised("e", read_settings(tmp_path / "config.json"), CheckpointFiles.in_folder(tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_types_are_named_and_not_called_damage(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({f"{W}.weight": torch.ones(4, 4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(TensorFileError, match=rf"{W}.weight: F8_E.* is a type of quantised weights; give") as caught:
        CheckpointFiles.in_folder(tmp_path)
    assert "fetch it again" not in str(caught.value)


def test_integers_that_are_no_weights_are_fine(tmp_path: Path) -> None:
    """Masks and positions that older models keep, and a configuration that says there is no quantisation."""
    save_file(
        {
            **PLAIN,
            "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
            "embeddings.position_ids": torch.arange(4)[None],
            "norm.num_batches_tracked": torch.tensor(1),
        },
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    refuse_quantised("e", read_settings(tmp_path / "config.json"), CheckpointFiles.in_folder(tmp_path))
    assert read_settings(tmp_path / "none.json") == {}
