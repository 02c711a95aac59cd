"""Names: which entries a model has, and how a running model's names map to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.convert.shape import ModelShape, read_shape
from megatron_rl.convert.table import entries, find_entry, global_name, hf_tensors
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model

VARIANTS = [
    ("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {}),
    ("qwen3", {"attention_bias": True}),
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
