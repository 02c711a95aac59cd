"""What is decided by the device and by what is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_rl.convert.shape import read_shape
from megatron_rl.errors import UserError
from megatron_rl.model import build, specs
from megatron_rl.model.attention import AsSpecified, PackedCausalAttention
from tests.policy_case import tiny_config
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tied=True, seed=0)


def megatron_config(model: Path, device: str):
    return build.transformer_config(tiny_config(model), read_shape(model), torch.device(device))


@pytest.mark.parametrize("is_built", [True, False])
def test_gradient_accumulation_is_fused_only_where_the_kernel_of_the_output_layer_is_built(
    model: Path, monkeypatch: pytest.MonkeyPatch, is_built: bool
) -> None:
    monkeypatch.setattr(specs, "has_transformer_engine", lambda: True)  # alone, it is not enough
    kernels = {"fused_weight_gradient_mlp_cuda"} if is_built else set()
    monkeypatch.setattr(build, "find_spec", lambda name: name if name in kernels else None)
    assert megatron_config(model, "cuda").gradient_accumulation_fusion is is_built
    assert megatron_config(model, "cpu").gradient_accumulation_fusion is False


def test_transformer_engine_serves_gpus_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "has_transformer_engine", lambda: True)
    theirs = ModuleSpec(object, submodules=SimpleNamespace(self_attention=ModuleSpec(MLASelfAttention)))
    monkeypatch.setattr(specs, "get_gpt_layer_with_transformer_engine_spec", lambda **_options: theirs)
    assert specs.layer_spec(megatron_config(model, "cuda")) is theirs
    assert theirs.submodules.self_attention.module is AsSpecified
    local = specs.layer_spec(megatron_config(model, "cpu"))
    assert local.submodules.self_attention.submodules.core_attention is PackedCausalAttention
    assert local.submodules.input_layernorm is WrappedTorchNorm
    chosen = build.transformer_config(
        tiny_config(model, "policy.megatron_cfg.transformer_impl=local"), read_shape(model), torch.device("cuda")
    )
    assert specs.layer_spec(chosen).submodules.input_layernorm is WrappedTorchNorm


@pytest.mark.parametrize("chosen", ["transformer_engine", None])
def test_transformer_engine_is_not_replaced_without_a_word(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "has_transformer_engine", lambda: False)
    with pytest.raises(UserError, match=r"transformer_impl.*: needs Transformer Engine on a GPU.*set it to local"):
        specs.uses_transformer_engine(chosen, torch.device("cuda"))
    assert not specs.uses_transformer_engine("local", torch.device("cuda"))
