"""What SGLang holds of Mixtral; of DeepSeek-V3 it is not known, and said so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.convert.architecture.shape import ModelShape, read_shape
from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.served import RolloutLayout, served_parameters
from tests.tiny_models import make_tiny_model

MOE = "model.layers.1.block_sparse_moe."


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("mixtral"), "mixtral", tied=False, seed=0, head_dim=8)


def filled(model: Path, shape: ModelShape, layout: RolloutLayout, tp_rank: int) -> dict[str, torch.Tensor]:
    """The parameters of one rank; what no part fills stays NaN."""
    stored, found = load_file(model / "model.safetensors"), {}
    for parameter in served_parameters(shape, layout, tp_rank):
        values = torch.full(parameter.shape, torch.nan)
        for part in parameter.boxes:
            source = stored[part.hf_name][tuple(slice(a, a + n) for a, n in zip(part.hf_start, part.size, strict=True))]
            front = part.start[: len(part.start) - len(part.size)]
            corner = part.start[len(front) :]
            values[(*front, *(slice(a, a + n) for a, n in zip(corner, part.size, strict=True)))] = source
        found[parameter.name] = values
    return found


def test_experts_of_mixtral_are_stacked_gate_over_up(mixtral: Path) -> None:
    stored, shape = load_file(mixtral / "model.safetensors"), read_shape(mixtral)
    whole = filled(mixtral, shape, RolloutLayout(), 0)
    w13 = torch.stack([torch.cat([stored[f"{MOE}experts.{e}.{w}.weight"] for w in ("w1", "w3")]) for e in range(4)])
    w2 = torch.stack([stored[f"{MOE}experts.{e}.w2.weight"] for e in range(4)])
    assert torch.equal(whole[MOE + "experts.w13_weight"], w13)
    assert torch.equal(whole[MOE + "experts.w2_weight"], w2)
    assert torch.equal(whole[MOE + "gate.weight"], stored[MOE + "gate.weight"])
    assert {name for name in whole if "layers.1." in name} == {
        MOE + "experts.w13_weight", MOE + "experts.w2_weight", MOE + "gate.weight",
        "model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight",
    }  # fmt: skip

    cut = filled(mixtral, shape, RolloutLayout(tp_size=2), 1)
    assert torch.equal(cut[MOE + "experts.w13_weight"], torch.cat([w13[:, 16:32], w13[:, 48:]], 1))
    assert torch.equal(cut[MOE + "experts.w2_weight"], w2[:, :, 16:])
    spread = filled(mixtral, shape, RolloutLayout(tp_size=2, ep_size=2), 1)
    assert torch.equal(spread[MOE + "experts.w13_weight"], w13[2:])


def test_every_tensor_has_its_place(mixtral: Path) -> None:
    shape = read_shape(mixtral)
    used = {part.hf_name for parameter in served_parameters(shape, RolloutLayout(), 0) for part in parameter.boxes}
    assert used == set(hf_tensors(shape))


def test_what_is_not_known_is_refused(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="head_dim"):
        served_parameters(replace(read_shape(mixtral), head_dim=16), RolloutLayout(), 0)
    shape = read_shape(make_tiny_model(tmp_path, "deepseek_v3", tied=False, seed=0))
    with pytest.raises(UserError, match="transport=tensors"):
        served_parameters(shape, RolloutLayout(), 0)
