"""8-bit weights are dequantised block by block, prediction layers are left out and named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape, read_shape
from megatron_rl.convert.hf.checkpoint_view import CheckpointView, exported_config
from megatron_rl.convert.hf.load import check_coverage, load_parameter
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model

ROWS, COLUMNS = 24, 16
"""Of a block; no side of a weight below is a multiple of both."""
WEIGHT = "model.layers.1.self_attn.kv_b_proj.weight"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
EXTRA = "model.layers.2.eh_proj.weight"


def dequantised(weight: Tensor, scales: Tensor) -> Tensor:
    """Element by element, in float64."""
    whole = torch.empty(weight.shape, dtype=torch.float64)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            whole[i, j] = float(weight[i, j]) * float(scales[i // ROWS, j // COLUMNS])
    return whole


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A DeepSeek-V3 with two weights in eight bits and a layer behind the last."""
    make_tiny_model(tmp_path, "deepseek_v3", tied=False, seed=1, num_nextn_predict_layers=1)
    tensors, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(2)
    for name in (WEIGHT, UP):
        rows, columns = tensors[name].shape
        tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // ROWS), -(-columns // COLUMNS), generator=generator) + 0.5
        tensors[name + "_scale_inv"] = scales / 100
    tensors[EXTRA] = torch.zeros(64, 128)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [ROWS, COLUMNS]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def view_of(directory: Path) -> tuple[CheckpointView, ModelShape]:
    shape = read_shape(directory)
    return CheckpointView(HFReader(directory), shape), shape


def test_any_rectangle_is_dequantised(checkpoint: Path) -> None:
    stored, (view, _) = load_file(checkpoint / "model.safetensors"), view_of(checkpoint)
    for name in (WEIGHT, UP):
        true = dequantised(stored[name], stored[name + "_scale_inv"])
        assert torch.equal(view.read(name).double(), true.float().double())
        for rows in (slice(0, 24), slice(5, 6), slice(23, 25), slice(7, true.shape[0])):
            for columns in (slice(0, true.shape[1]), slice(15, 17), slice(16, 32), slice(3, 5)):
                assert torch.equal(view.read(name, (rows, columns)), true[rows, columns].float())
    other = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(view.read(other), stored[other])


def test_a_shard_takes_its_part_of_the_blocks_and_reads_no_other(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, (view, shape) = load_file(checkpoint / "model.safetensors"), view_of(checkpoint)
    check_coverage(shape, view, tp_size=2)
    reads: list[tuple[str, int]] = []
    read = HFReader.read
    monkeypatch.setattr(HFReader, "read", lambda *a: reads.append((a[1], (t := read(*a)).numel())) or t)
    out = torch.empty(32, 64)
    load_parameter("decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight", view, shape, 1, 2, out)
    monkeypatch.undo()
    gate = stored["model.layers.1.mlp.experts.3.gate_proj.weight"]
    assert torch.equal(out, torch.cat([gate[16:], dequantised(stored[UP], stored[UP + "_scale_inv"])[16:].float()]))
    assert (UP, 16 * 64) in reads and (UP + "_scale_inv", 2 * 4) in reads


def test_a_prediction_layer_is_left_out_and_said(checkpoint: Path) -> None:
    view, shape = view_of(checkpoint)
    assert list(view.dropped) == [EXTRA] and EXTRA not in view.names
    line = view.summary()
    assert "1 tensors" in line and EXTRA in line and "prediction" in line and "\n" not in line
    with pytest.raises(UserError, match="eh_proj"):  # a config without such layers takes it for a mistake
        check_coverage(shape, CheckpointView(HFReader(checkpoint), replace(shape, num_mtp_layers=0)))


def edit(directory: Path, **changes: Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def test_wrong_scales_are_refused(checkpoint: Path) -> None:
    edit(checkpoint, **{WEIGHT + "_scale_inv": torch.ones(2, 2)})
    view, shape = view_of(checkpoint)
    with pytest.raises(UserError, match="kv_b_proj"):
        check_coverage(shape, view)
    edit(checkpoint, **{WEIGHT + "_scale_inv": None})
    view, shape = view_of(checkpoint)
    with pytest.raises(UserError, match="F8_E4M3"):
        check_coverage(shape, view)


def test_scales_of_a_weight_that_has_all_its_bits_are_refused(checkpoint: Path) -> None:
    edit(checkpoint, **{WEIGHT: load_file(checkpoint / "model.safetensors")[WEIGHT].float()})
    view, shape = view_of(checkpoint)
    with pytest.raises(UserError, match="8-bit floats"):
        check_coverage(shape, view)


def test_an_export_does_not_claim_what_it_lacks() -> None:
    fields = {"hidden_size": 64, "num_nextn_predict_layers": 1, "quantization_config": {"quant_method": "fp8"}}
    assert exported_config(fields) == {"hidden_size": 64, "num_nextn_predict_layers": 0}
    assert exported_config({"hidden_size": 64}) == {"hidden_size": 64}
