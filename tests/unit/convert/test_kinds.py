"""Boxes: worked examples, and tilings of random shapes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.hf import load
from megatron_rl.convert.tables.kinds import (
    Box,
    ShardKind,
    boxes,
    check_tensor_parallel,
    column,
    gated,
    hf_shapes,
    padded_vocab_size,
    qkv,
    replicated,
    row,
    shard_shape,
    vocab,
)  # fmt: skip
from megatron_rl.errors import UserError

SHAPE = ModelShape(
    family="qwen3", num_layers=2, hidden_size=6, num_attention_heads=4, num_key_value_heads=2, head_dim=2,
    intermediate_size=8, vocab_size=10, tied=False, norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qkv_bias=True,
    proj_bias=True, mlp_bias=True, qk_norm=True, max_position_embeddings=64, initializer_range=0.02, dtype="float32",
    bos_token_id=None,
    eos_token_ids=(), pad_token_id=None,
)  # fmt: skip
KINDS = [replicated("hidden"), column("ffn", "hidden"), row("hidden", "ffn"), row("hidden", "q"), vocab("hidden"),
         qkv("hidden"), qkv(), gated("ffn", "hidden"), gated("ffn")]  # fmt: skip


def test_qkv_goes_group_by_group() -> None:
    # Two groups of two query heads, two rows a head: group 1 is queries 4-7, key 2-3, value 2-3.
    assert boxes(qkv(), SHAPE, 1, 2) == [Box(0, (4,), (0,), (4,)), Box(1, (2,), (4,), (2,)), Box(2, (2,), (6,), (2,))]
    whole = boxes(qkv("hidden"), SHAPE, 0, 1)
    assert [(box.tensor, box.hf_start[0], box.size[0]) for box in whole] == [
        (0, 0, 4), (1, 0, 2), (2, 0, 2), (0, 4, 4), (1, 2, 2), (2, 2, 2),
    ]  # fmt: skip


def test_gate_is_above_up_on_each_rank() -> None:
    assert boxes(gated("ffn"), SHAPE, 1, 2) == [Box(0, (4,), (0,), (4,)), Box(1, (4,), (4,), (4,))]


def test_row_cuts_columns() -> None:
    assert boxes(row("hidden", "ffn"), SHAPE, 1, 2) == [Box(0, (0, 4), (0, 0), (6, 4))]


def test_vocabulary_is_cut_after_padding() -> None:
    assert padded_vocab_size(10, 2, 4) == 16
    assert [boxes(vocab("hidden"), SHAPE, rank, 2, vocab_multiple=4) for rank in range(2)] == [
        [Box(0, (0, 0), (0, 0), (8, 6))], [Box(0, (8, 0), (0, 0), (2, 6))],
    ]  # fmt: skip
    assert boxes(vocab("hidden"), SHAPE, 1, 2, vocab_multiple=16) == []  # nothing but padding


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "multiple", "padded"),
    [(128, 1, 128, 128), (129, 1, 128, 256), (131, 2, 128, 256), (151936, 4, 128, 152064)],
)
def test_padded_vocab_size(vocab_size: int, tp_size: int, multiple: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tp_size, multiple) == padded


@pytest.mark.parametrize(("changes", "tp_size", "field"), [
    ({"num_attention_heads": 6, "num_key_value_heads": 4}, 4, "num_attention_heads"),
    ({}, 4, "num_key_value_heads"),
    ({"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 10}, 4, "intermediate_size"),
    ({}, 0, "num_attention_heads"),
])  # fmt: skip
def test_indivisible_layout_is_refused(changes: dict[str, int], tp_size: int, field: str) -> None:
    with pytest.raises(UserError, match=field) as caught:
        check_tensor_parallel(replace(SHAPE, **changes), tp_size)
    assert (caught.value.field, caught.value.value) == ("policy.megatron_cfg.tensor_model_parallel_size", tp_size)
    with pytest.raises(UserError, match=field):
        shard_shape(replicated("hidden"), replace(SHAPE, **changes), tp_size)


def random_shape(source: random.Random, tp_size: int) -> ModelShape:
    groups = tp_size * source.randint(1, 3)
    return replace(
        SHAPE, hidden_size=source.randint(1, 9), num_attention_heads=groups * source.randint(1, 3),
        num_key_value_heads=groups, head_dim=2 * source.randint(1, 3),
        intermediate_size=tp_size * source.randint(1, 6), vocab_size=source.randint(1, 70),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}-{len(kind.dims)}")
def test_random_shapes_are_tiled_exactly_once_on_both_sides(kind: ShardKind) -> None:
    source = random.Random(repr(kind))
    for _ in range(40):
        tp_size, multiple = source.choice([1, 2, 4, 8]), source.choice([1, 3, 16])
        shape = random_shape(source, tp_size)
        counts = [torch.zeros(extent, dtype=torch.int) for extent in hf_shapes(kind, shape)]
        for rank in range(tp_size):
            shard = torch.zeros(shard_shape(kind, shape, tp_size, vocab_multiple=multiple), dtype=torch.int)
            for box in boxes(kind, shape, rank, tp_size, vocab_multiple=multiple):
                counts[box.tensor][box.hf_slices] += 1
                shard[box.shard_slices] += 1
                assert counts[box.tensor][box.hf_slices].numel() == shard[box.shard_slices].numel() == box.num_elements
            expected = torch.ones_like(shard)
            if kind.name == "vocab":
                expected[max(0, shape.vocab_size - rank * shard.shape[0]) :] = 0  # rows of padding
            assert torch.equal(shard, expected)
        readers = tp_size if kind.name == "replicated" else 1
        assert all((count == readers).all() for count in counts)
        load.check_tiling(kind, shape, tp_size, vocab_multiple=multiple)


def broken(pieces: list[Box], how: str) -> list[Box]:
    first, *others = pieces
    return {
        "gap": others,
        "twice": [first, first, *others],
        "outside": [replace(first, shard_start=(first.shard_start[0] + 1, *first.shard_start[1:])), *others],
        "swapped source": [replace(first, hf_start=pieces[-1].hf_start, tensor=pieces[-1].tensor), *others],
    }[how]


@pytest.mark.parametrize("how", ["gap", "twice", "outside", "swapped source"])
@pytest.mark.parametrize("kind", [qkv("hidden"), gated("ffn", "hidden")], ids=lambda kind: kind.name)
def test_check_tiling_finds_wrong_boxes(kind: ShardKind, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "boxes", lambda *args, **kwargs: broken(boxes(*args, **kwargs), how))
    with pytest.raises(AssertionError):
        load.check_tiling(kind, SHAPE, 2)


@pytest.mark.parametrize(("starts", "complaint"), [((0, 2, 2), "overlap"), ((0, 2), "gap"), ((0, 2, 5), "outside")])
def test_tiling_of_six_by_pieces_of_two(starts: tuple[int, ...], complaint: str) -> None:
    load._assert_tiles([((start,), (2,)) for start in (0, 2, 4)], (6,))
    with pytest.raises(AssertionError, match=complaint):
        load._assert_tiles([((start,), (2,)) for start in starts], (6,))
