"""Names in a torch_dist checkpoint, against what Megatron-Core 0.16.1 and Transformer Engine 2 models ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.convert.offline.torch_dist import StoredLayout, stored_names
from tests.tiny_models import make_tiny_model

LINEAR = {"self_attention.linear_qkv", "self_attention.linear_proj"}


def names(directory: Path, family: str, spec: str) -> tuple[set[str], set[str]]:
    """(tensors, objects without their shard) of the layers, named from there."""
    layout = StoredLayout(read_shape(make_tiny_model(directory, family, tied=False, seed=0)), spec)
    layout.check()
    start = "decoder.layers."
    objects = {key.partition("/")[0].removesuffix("._extra_state") for key in layout.objects}
    return (
        {key.removeprefix(start) for key in layout.extents if key.startswith(start)},
        {key.removeprefix(start) for key in objects},
    )


def test_transformer_engine_dense(tmp_path: Path) -> None:
    """As in TE spec: both norms are fused; those of queries and keys, and the last, have a state of their own."""
    tensors, objects = names(tmp_path, "qwen3", "te")
    assert tensors == {
        "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight", "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
    }  # fmt: skip
    assert objects == LINEAR | {
        "mlp.linear_fc1", "mlp.linear_fc2", "self_attention.q_layernorm", "self_attention.k_layernorm",
        "decoder.final_layernorm",
    }  # fmt: skip


def test_local_dense_has_the_same_tensors_and_fewer_objects(tmp_path: Path) -> None:
    local, te = names(tmp_path / "a", "qwen3", "local"), names(tmp_path / "b", "qwen3", "te")
    assert local[0] == te[0]
    assert local[1] == LINEAR | {"mlp.linear_fc1", "mlp.linear_fc2"}


@pytest.mark.parametrize(
    ("spec", "norms"),
    [
        ("local", {"mlp.linear_fc1.layer_norm_weight"}),
        ("te", {"pre_mlp_layernorm.weight"}),
        ("both", {"mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"}),
    ],
)
def test_norm_before_experts(spec: str, norms: set[str], tmp_path: Path) -> None:
    """Not fused in Transformer Engine's spec; Megatron's local spec renames it as if it were."""
    tensors, objects = names(tmp_path, "qwen3_moe", spec)
    assert {name for name in tensors if "mlp" in name and "norm" in name} == norms
    assert {"mlp.experts.experts.linear_fc1.weight", "mlp.router.weight"} < tensors
    assert ("pre_mlp_layernorm" in objects) == (spec != "local") and "mlp.experts.experts.linear_fc2" in objects


def test_layers_that_differ_have_keys_of_their_own(tmp_path: Path) -> None:
    te, _ = names(tmp_path / "a", "deepseek_v3", "te")
    local, objects = names(tmp_path / "b", "deepseek_v3", "local")
    fused = {"0.self_attention.linear_q_up_proj.layer_norm_weight", "0.mlp.linear_fc1.layer_norm_weight"}
    assert fused | {"0.input_layernorm.weight", "1.pre_mlp_layernorm.weight"} < te
    assert {"0.self_attention.q_layernorm.weight", "0.pre_mlp_layernorm.weight", "1.mlp.router.expert_bias"} < local
    assert not fused & local and {"1.mlp.shared_experts.linear_fc1", "1.mlp.experts.experts.linear_fc1"} < objects


def test_objects_count_layers_and_experts(tmp_path: Path) -> None:
    objects = StoredLayout(read_shape(make_tiny_model(tmp_path, "qwen3_moe", tied=False, seed=0)), "te").objects
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_1_2" in objects
    assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_1.3_2.4" in objects
    assert "decoder.final_layernorm._extra_state/shard_0_1" in objects


def test_an_expert_is_looked_for_wherever_megatron_may_put_it(tmp_path: Path) -> None:
    shape = read_shape(make_tiny_model(tmp_path, "qwen3_moe", tied=False, seed=0))
    places = stored_names("decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight", shape)
    assert {(slot.key, slot.index) for slot in places} == {
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight", (1, 3)),
        ("decoder.layers.1.mlp.experts.experts.linear_fc2.weight", (3,)),
        ("decoder.layers.mlp.experts.experts.3.linear_fc2.weight", (1,)),
        ("decoder.layers.1.mlp.experts.experts.3.linear_fc2.weight", ()),
    }
