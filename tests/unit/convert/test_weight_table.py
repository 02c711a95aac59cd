"""Names: which entries a model has, and how a running model's names map to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.convert.architecture.shape import ModelShape, read_shape
from megatron_rl.convert.tables.table import (
    dropped_tensors,
    entries,
    find_entry,
    float32_tensors,
    global_name,
    hf_tensors,
    is_extra_state,
    names_of_all_experts,
)
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model

VARIANTS = [
    ("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {}),
    ("qwen3", {"attention_bias": True}), ("qwen3_moe", {}), ("mixtral", {}), ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 0}),
]  # fmt: skip


def shape_of(directory: Path, family: str, *, tied: bool, **overrides: object) -> ModelShape:
    return read_shape(make_tiny_model(directory, family, tied=tied, seed=0, **overrides))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_table_lists_exactly_what_transformers_stores(
    family: str, overrides: dict[str, object], tied: bool, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    shape = shape_of(tmp_path, family, tied=tied, **overrides)
    stored = load_file(tmp_path / "model.safetensors")
    assert hf_tensors(shape) == {name: tuple(tensor.shape) for name, tensor in stored.items()}


def test_each_hf_tensor_has_one_owner(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "qwen2", tied=True)
    owned = [name for entry in entries(shape).values() if not entry.is_copy for name in entry.hf_names]
    assert len(owned) == len(set(owned))
    copies = [entry for entry in entries(shape).values() if entry.is_copy]
    assert [(copy.name, copy.hf_names) for copy in copies] == [("output_layer.weight", ("model.embed_tokens.weight",))]


def test_untied_output_layer_is_no_copy(tmp_path: Path) -> None:
    entry = entries(shape_of(tmp_path, "qwen2", tied=False))["output_layer.weight"]
    assert (entry.hf_names, entry.is_copy) == (("lm_head.weight",), False)


def test_entries_go_from_embedding_to_output(tmp_path: Path) -> None:
    names = list(entries(shape_of(tmp_path, "llama", tied=False, num_hidden_layers=12)))
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("decoder.layers.")]
    assert layers == sorted(layers) and set(layers) == set(range(12))


@pytest.mark.parametrize(("fused", "plain"), [
    ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.1.input_layernorm.weight"),
    ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "decoder.layers.1.pre_mlp_layernorm.weight"),
])  # fmt: skip
def test_fused_norm_is_the_plain_one(fused: str, plain: str, tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "qwen3", tied=True)
    assert find_entry(fused, shape) == find_entry(plain, shape) == entries(shape)[plain]


ATTENTION = "decoder.layers.1.self_attention."
EXPERTS = "decoder.layers.1.mlp.experts."


@pytest.mark.parametrize(("variant", "plain"), [
    (ATTENTION + "linear_q_up_proj.layer_norm_weight", ATTENTION + "q_layernorm.weight"),
    (ATTENTION + "linear_kv_up_proj.layer_norm_weight", ATTENTION + "kv_layernorm.weight"),
    ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
    (EXPERTS + "linear_fc1.weight5", EXPERTS + "local_experts.5.linear_fc1.weight"),
    (EXPERTS + "linear_fc2.weight0", EXPERTS + "local_experts.0.linear_fc2.weight"),
])  # fmt: skip
def test_fused_and_grouped_names_of_deepseek(variant: str, plain: str, tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "deepseek_v3", tied=False)
    assert find_entry(variant, shape) == find_entry(plain, shape) == entries(shape)[plain]


def test_the_legacy_grouped_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="moe_use_legacy_grouped_gemm"):
        find_entry("decoder.layers.0.mlp.experts.weight1", shape_of(tmp_path, "mixtral", tied=False))


@pytest.mark.parametrize("name", ["experts.local_experts.1.linear_fc2.weight", "experts.linear_fc2.weight1"])
def test_grouped_and_single_experts_are_counted_alike(name: str, tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "mixtral", tied=False)
    third = global_name(f"module.decoder.layers.0.mlp.{name}", 1, expert_offset=2)
    assert find_entry(third, shape).hf_names == ("model.layers.1.block_sparse_moe.experts.3.w2.weight",)
    assert find_entry(third, shape).expert == 3
    assert [find_entry(each, shape).expert for each in names_of_all_experts(third, shape)] == [0, 1, 2, 3]
    shared = "decoder.layers.1.mlp.shared_experts.linear_fc1.weight"
    assert global_name(shared, 0, expert_offset=2) == shared and names_of_all_experts(shared, shape) == [shared]


def test_dense_layers_have_no_experts_and_others_no_mlp(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "deepseek_v3", tied=False)
    assert [shape.has_experts(layer) for layer in range(2)] == [False, True]
    for wrong in ("decoder.layers.0.mlp.router.weight", "decoder.layers.1.mlp.linear_fc1.weight"):
        with pytest.raises(UserError, match=wrong):
            find_entry(wrong, shape)


def test_the_bias_of_a_choice_stays_float32(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "deepseek_v3", tied=False)
    assert float32_tensors(shape) == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert float32_tensors(shape_of(tmp_path / "other", "qwen3_moe", tied=False)) == set()


def test_prediction_layers_are_dropped_with_a_reason_and_nothing_else_is(tmp_path: Path) -> None:
    shape = replace(shape_of(tmp_path, "deepseek_v3", tied=False), num_mtp_layers=1)
    names = ["model.layers.1.mlp.gate.weight", "model.layers.2.eh_proj.weight", "model.layers.20.eh_proj.weight",
             "model.layers.3.eh_proj.weight", "lm_head.weight"]  # fmt: skip
    dropped = dropped_tensors(names, shape)
    assert list(dropped) == ["model.layers.2.eh_proj.weight"] and "prediction" in dropped[names[1]]
    assert dropped_tensors(names, replace(shape, num_mtp_layers=0)) == {}


def test_extra_state_is_known() -> None:
    assert is_extra_state("decoder.layers.1.self_attention.linear_proj._extra_state")
    assert not is_extra_state("decoder.layers.1.self_attention.linear_proj.weight")


@pytest.mark.parametrize("name", [
    "decoder.layers.0.mlp.linear_fc1.bias", "decoder.layers.2.mlp.linear_fc1.weight", "value_head.weight",
])  # fmt: skip
def test_unknown_parameter_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        find_entry(name, shape_of(tmp_path, "qwen3", tied=True))


@pytest.mark.parametrize(("local", "offset", "expected"), [
    ("decoder.layers.1.mlp.linear_fc2.weight", 4, "decoder.layers.5.mlp.linear_fc2.weight"),
    ("module.module.decoder.layers.10.input_layernorm.weight", 0, "decoder.layers.10.input_layernorm.weight"),
    ("module.output_layer.weight", 4, "output_layer.weight"),
    ("decoder.final_layernorm.weight", 4, "decoder.final_layernorm.weight"),
])  # fmt: skip
def test_global_name(local: str, offset: int, expected: str) -> None:
    assert global_name(local, offset) == expected
