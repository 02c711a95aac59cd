"""HF -> shards -> HF, and the shards against what Megatron computes with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from megatron_rl.convert.architecture.shape import ModelShape, read_shape
from megatron_rl.convert.hf.export import HFWriter, merge_parameter
from megatron_rl.convert.hf.load import check_coverage, load_parameter
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.convert.tables import table
from megatron_rl.convert.tables.kinds import Rule, shard_shape
from megatron_rl.convert.tables.table import entries, find_entry
from tests.tiny_models import make_tiny_model

MODELS = [
    ("llama", False, {}), ("llama", True, {}), ("llama", False, {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", False, {}), ("qwen2", True, {}), ("qwen3", False, {}), ("qwen3", True, {}), ("mixtral", True, {}),
    ("deepseek_v3", False, {}), ("deepseek_v3", True, {"q_lora_rank": None}),
]  # fmt: skip


def shards_of(name: str, reader: HFReader, shape: ModelShape, tp_size: int, vocab_multiple: int = 128) -> list[Tensor]:
    """Every rank's shard; what ``load_parameter`` leaves untouched stays NaN."""
    extent = shard_shape(find_entry(name, shape).kind, shape, tp_size, vocab_multiple=vocab_multiple)
    shards = [torch.full(extent, torch.nan) for _ in range(tp_size)]
    for rank, out in enumerate(shards):
        load_parameter(name, reader, shape, rank, tp_size, out, vocab_multiple=vocab_multiple)
    return shards


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(("family", "tied", "overrides"), MODELS)
def test_round_trip_is_bit_exact(
    family: str, tied: bool, overrides: dict[str, bool], tp_size: int, tmp_path: Path
) -> None:
    source = make_tiny_model(tmp_path / "in", family, tied=tied, seed=tp_size, **overrides)
    shape, reader = read_shape(source), HFReader(source)
    check_coverage(shape, reader, tp_size=tp_size)
    with HFWriter(tmp_path / "out", shape, source=source) as writer:
        for name in entries(shape):
            for hf_name, tensor in merge_parameter(name, shards_of(name, reader, shape, tp_size), shape).items():
                writer.add(hf_name, tensor)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_are_filled_and_padding_is_zero(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path, "qwen3", tied=True, seed=0)
    shape, reader = read_shape(source), HFReader(source)
    for name in entries(shape):
        assert not any(shard.isnan().any() for shard in shards_of(name, reader, shape, 2)), name
    first, second = shards_of("output_layer.weight", reader, shape, 2)
    assert first.shape == second.shape == (128, 64)  # 131 rows, padded to 256
    assert torch.equal(first, reader.read("model.embed_tokens.weight")[:128])
    assert torch.equal(second[:3], reader.read("model.embed_tokens.weight")[128:])
    assert not second[3:].any()


def test_bfloat16_checkpoint_fills_float32_exactly_and_comes_back(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in", "llama", tied=False, seed=0, dtype="bfloat16")
    shape, reader = read_shape(source), HFReader(source)
    assert shape.dtype == "bfloat16"
    with HFWriter(tmp_path / "out", shape, source=source) as writer:
        for name in entries(shape):
            for hf_name, tensor in merge_parameter(name, shards_of(name, reader, shape, 2), shape).items():
                assert tensor.dtype == torch.float32
                writer.add(hf_name, tensor)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)


def attention_inputs(x: Tensor, source: Path, shape: ModelShape, tp_size: int) -> list[tuple[Tensor, Tensor]]:
    """(what Megatron computes, what HF computes) for queries, keys and values, heads in order.

    The views and splits are those of ``SelfAttention.get_query_key_value_tensors`` in megatron.core.
    """
    prefix, reader = "decoder.layers.1.self_attention.linear_qkv", HFReader(source)
    weights = shards_of(prefix + ".weight", reader, shape, tp_size)
    biases = shards_of(prefix + ".bias", reader, shape, tp_size)
    num_groups, per_group = shape.num_key_value_heads // tp_size, shape.num_attention_heads // shape.num_key_value_heads
    parts: list[list[Tensor]] = [[], [], []]
    for weight, bias in zip(weights, biases, strict=True):
        mixed = (x @ weight.T + bias).view(len(x), num_groups, (per_group + 2) * shape.head_dim)
        split = torch.split(mixed, [per_group * shape.head_dim, shape.head_dim, shape.head_dim], dim=2)
        for part, piece in zip(parts, split, strict=True):
            part.append(piece.reshape(len(x), -1, shape.head_dim))
    hf = load_file(source / "model.safetensors")
    layer = "model.layers.1.self_attn."
    expected = [(x @ hf[f"{layer}{p}_proj.weight"].T + hf[f"{layer}{p}_proj.bias"]) for p in "qkv"]
    return [(torch.cat(part, dim=1).flatten(1), tensor) for part, tensor in zip(parts, expected, strict=True)]


def mlp_outputs(x: Tensor, source: Path, shape: ModelShape, tp_size: int) -> tuple[Tensor, Tensor]:
    """(Megatron, HF), with the chunk of ``MLP.forward`` in megatron.core and the sum over ranks."""
    reader, prefix = HFReader(source), "decoder.layers.1.mlp."
    total = torch.zeros(len(x), shape.hidden_size)
    first, second = (shards_of(f"{prefix}linear_fc{i}.weight", reader, shape, tp_size) for i in (1, 2))
    for fc1, fc2 in zip(first, second, strict=True):
        gate, up = torch.chunk(x @ fc1.T, 2, dim=-1)
        total += (silu(gate) * up) @ fc2.T
    gate, up, down = (reader.read(f"model.layers.1.mlp.{p}_proj.weight") for p in ("gate", "up", "down"))
    return total, (silu(x @ gate.T) * (x @ up.T)) @ down.T


def attention_outputs(x: Tensor, source: Path, shape: ModelShape, tp_size: int) -> tuple[Tensor, Tensor]:
    """(Megatron, HF): each rank projects its own heads, the bias is added once after the sum over ranks."""
    reader, prefix = HFReader(source), "decoder.layers.1.self_attention.linear_proj."
    heads = x.chunk(tp_size, dim=-1)
    weights, biases = (shards_of(prefix + name, reader, shape, tp_size) for name in ("weight", "bias"))
    total = sum(part @ weight.T for part, weight in zip(heads, weights, strict=True)) + biases[-1]
    weight, bias = (reader.read(f"model.layers.1.self_attn.o_proj.{name}") for name in ("weight", "bias"))
    return total, x @ weight.T + bias


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_output_projection_computes_what_hf_computes(tp_size: int, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path, "qwen3", tied=False, seed=0, attention_bias=True)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))  # 8 heads of 16, unlike hidden_size
    torch.testing.assert_close(*attention_outputs(x, source, read_shape(source), tp_size), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_fused_layout_computes_what_hf_computes(tp_size: int, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path, "qwen2", tied=False, seed=0)
    shape, x = read_shape(source), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for megatron, hf in attention_inputs(x, source, shape, tp_size):
        torch.testing.assert_close(megatron, hf, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*mlp_outputs(x, source, shape, tp_size), atol=1e-5, rtol=1e-5)


def swap(rules: tuple[Rule, ...], fragment: str, order: tuple[int, ...]) -> tuple[Rule, ...]:
    """The table with the HF names of some lines in another order."""
    return tuple(
        Rule(r.megatron, tuple(r.hf[i] for i in order), r.kind, r.needs, r.is_copy) if fragment in r.megatron else r
        for r in rules
    )


@pytest.mark.parametrize(("fragment", "order"), [("linear_qkv", (0, 2, 1)), ("linear_fc1", (1, 0))])
def test_swapped_names_are_seen_by_the_layout_test_though_not_by_a_round_trip(
    fragment: str, order: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table.TABLES, "qwen2", swap(table.TABLES["qwen2"], fragment, order))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_fused_layout_computes_what_hf_computes(2, tmp_path)
    # Keys and values, gate and up have equal shapes: tilings and round trips cannot tell them apart.
    test_round_trip_is_bit_exact("qwen2", False, {}, 2, tmp_path / "again")


def test_fused_norm_name_loads_the_norm(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path, "qwen3", tied=True, seed=0)
    shape, out = read_shape(source), torch.empty(64)
    load_parameter("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", HFReader(source), shape, 1, 2, out)
    assert torch.equal(out, HFReader(source).read("model.layers.1.post_attention_layernorm.weight"))


def test_tied_copy_is_not_exported(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path, "qwen3", tied=True, seed=0)
    shape, reader = read_shape(source), HFReader(source)
    assert merge_parameter("output_layer.weight", shards_of("output_layer.weight", reader, shape, 2), shape) == {}


def test_ranks_that_disagree_on_a_replicated_parameter_are_refused(tmp_path: Path) -> None:
    shape = read_shape(make_tiny_model(tmp_path, "qwen3", tied=True, seed=0))
    name, shards = "decoder.final_layernorm.weight", [torch.ones(64), torch.ones(64)]
    assert torch.equal(merge_parameter(name, shards, shape)["model.norm.weight"], torch.ones(64))
    shards[1][7] += 1e-6
    with pytest.raises(RuntimeError, match="ranks 0 and 1"):
        merge_parameter(name, shards, shape)


def test_merged_tensor_does_not_share_memory_with_the_model(tmp_path: Path) -> None:
    shape = read_shape(make_tiny_model(tmp_path, "qwen3", tied=True, seed=0))
    shard = torch.ones(64)
    merged = merge_parameter("decoder.final_layernorm.weight", [shard], shape)["model.norm.weight"]
    shard.zero_()
    assert merged.all()


def test_only_the_needed_slices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny_model(tmp_path, "qwen3", tied=False, seed=0)
    shape, reader, sizes = read_shape(source), HFReader(source), []
    read = HFReader.read
    monkeypatch.setattr(HFReader, "read", lambda *args: sizes.append((t := read(*args)).numel()) or t)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    load_parameter(name, reader, shape, 3, 4, torch.empty(48, 64))
    assert sum(sizes) == 48 * 64
