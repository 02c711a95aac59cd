"""What is decided by the device and by what is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.errors import UserError
from megatron_rl.model import build, optimizer, specs
from megatron_rl.model.attention import AsSpecified, PackedCausalAttention
from megatron_rl.model.trainable import Trainable
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


FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "masked_softmax_fusion")


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("qwen2", {}, (True, False, True, False)),
        ("qwen3", {}, (True, False, True, False)),
        ("qwen3_moe", {}, (True, False, True, False)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ("llama", {"attention_bias": True}, (True, True, True, False)),
        ("deepseek_v3", {}, (True, False, False, False)),
    ],
)
def test_fused_kernels_are_on_where_they_can_be_used(
    family: str, fields: dict, expected: tuple[bool, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "has_transformer_engine", lambda: True)
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(build.rope_utils, name, object())
    model = make_tiny_model(tmp_path, family, tied=False, seed=0, **fields)

    def chosen(device: str, *overrides: str) -> tuple[bool, ...]:
        found = build.transformer_config(tiny_config(model, *overrides), read_shape(model), torch.device(device))
        return tuple(getattr(found, name) for name in FUSIONS)

    assert chosen("cuda") == expected
    assert chosen("cpu") == chosen("cuda", "policy.megatron_cfg.transformer_impl=local") == (False,) * 4
    assert chosen("cuda", "policy.megatron_cfg.bias_activation_fusion=false") == (False, *expected[1:])
    assert chosen("cpu", "policy.megatron_cfg.bias_activation_fusion=true")[0]


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        (
            "qwen3",
            ("recompute_granularity=selective", "recompute_modules=[layernorm]"),
            "has nothing to compute again as",
        ),
        (
            "qwen3_moe",
            ("recompute_granularity=selective", "recompute_modules=[mlp]"),
            "has nothing to compute again as",
        ),
        ("qwen3", ("cpu_offloading=true", "cpu_offloading_num_layers=2"), "must be below the model's 2 layers"),
        ("qwen3", ("cpu_offloading=true", "cpu_offloading_num_layers=1"), "needs Transformer Engine's layers"),
    ],
)
def test_what_this_model_or_machine_has_not_is_refused(
    family: str, overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path, family, tied=False, seed=0)
    config = tiny_config(model, *(f"policy.megatron_cfg.{override}" for override in overrides))
    with pytest.raises(UserError, match=message):
        build.transformer_config(config, read_shape(model), torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("field", ["optimizer_cpu_offload", "use_precision_aware_optimizer"])
def test_optimizers_that_cannot_run_here_are_refused(
    model: Path, field: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "has_transformer_engine", lambda: False)
    names = dict.fromkeys((field, "use_precision_aware_optimizer"))
    config = tiny_config(
        model, "trainer.precision=bf16", *(f"policy.optim.optimizer_cfg.{name}=true" for name in names)
    )
    refused = field if device == "cpu" else "use_precision_aware_optimizer"
    with pytest.raises(UserError, match=f"optimizer_cfg.{refused} = True"):
        Trainable(
            config,
            read_shape(model),
            SimpleNamespace(device=torch.device(device)),
            optim=config.policy.optim,
            fill_weights=None,
            timer=None,
        )
    monkeypatch.setattr(optimizer, "has_transformer_engine", lambda: True)
    optimizer.check_optimizer(config.policy.optim, torch.device("cuda"))


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


def test_transformer_engine_shares_no_float32_sequence_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With accelerator auto the config alone does not show it."""
    monkeypatch.setattr(specs, "has_transformer_engine", lambda: True)

    def chosen(device: str, *overrides: str) -> int:
        config = tiny_config(model, *overrides, cp=2)
        return build.transformer_config(config, read_shape(model), torch.device(device)).context_parallel_size

    with pytest.raises(UserError, match=r"context_parallel_size = 2: must be 1 with trainer.precision=fp32"):
        chosen("cuda")
    local = "policy.megatron_cfg.transformer_impl=local"
    assert chosen("cuda", "trainer.precision=bf16") == chosen("cpu") == chosen("cuda", local) == 2


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_are_computed_together_by_transformer_engine_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "has_transformer_engine", lambda: True)
    path = make_tiny_model(tmp_path, family, tied=False, seed=0)  # type: ignore[arg-type]
    assert megatron_config(path, "cuda").moe_grouped_gemm is True
    assert megatron_config(path, "cpu").moe_grouped_gemm is False
    one_by_one = tiny_config(path, "policy.megatron_cfg.moe_grouped_gemm=false")
    assert build.transformer_config(one_by_one, read_shape(path), torch.device("cuda")).moe_grouped_gemm is False


@pytest.mark.parametrize(
    ("family", "setting", "device", "words"),
    [
        (
            "qwen3_moe",
            "moe_grouped_gemm=true",
            "cpu",
            "is a kernel of Transformer Engine, whose layers are not used here",
        ),
        (
            "qwen3_moe",
            "moe_router_fusion=true",
            "cpu",
            "is a kernel of Transformer Engine, whose layers are not used here",
        ),
        ("deepseek_v3", "moe_router_fusion=true", "cuda", "scores groups of experts otherwise"),
        ("qwen3_moe", "moe_token_dispatcher_type=flex", "cpu", "has no kernels for CPUs"),
        ("qwen3_moe", "moe_token_dispatcher_type=flex", "cuda", "needs the package deep_ep"),
    ],
)
def test_kernels_for_experts_that_cannot_be_used_are_refused(
    family: str, setting: str, device: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "has_transformer_engine", lambda: True)
    path = make_tiny_model(tmp_path, family, tied=False, seed=0)  # type: ignore[arg-type]
    config = tiny_config(path, f"policy.megatron_cfg.{setting}")
    with pytest.raises(UserError, match=words):
        build.transformer_config(config, read_shape(path), torch.device(device))
