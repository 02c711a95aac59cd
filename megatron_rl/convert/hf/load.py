"""Loads one rank's Megatron parameters from an HF checkpoint; no more than that rank's slices is read."""

from __future__ import annotations

import re
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.hf.reader import HFReader, TensorReader
from megatron_rl.convert.tables.kinds import DEFAULT_VOCAB_MULTIPLE, Extent, ShardKind, boxes, hf_shapes, shard_shape
from megatron_rl.convert.tables.table import entries, find_entry, hf_tensors
from megatron_rl.errors import UserError

__all__ = ["HFReader", "check_coverage", "check_shard", "check_tiling", "load_parameter"]

_DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Tensors that old checkpoints store although config.json determines them."""

_BLOCK_ELEMENTS = 2**24
"""Number compared at a time: a few tens of MB."""

_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_parameter(
    name: str, reader: TensorReader, shape: ModelShape, tp_rank: int, tp_size: int, out: Tensor, *,
    vocab_multiple: int = DEFAULT_VOCAB_MULTIPLE,
) -> None:  # fmt: skip
    """Fill one parameter of one rank. Padding rows of the vocabulary become zero.

    Args:
        name: global Megatron name (``table.global_name``).
        reader: the checkpoint.
        shape: its shape.
        tp_rank: rank in the tensor-parallel group.
        tp_size: its size.
        out: the parameter, of any dtype and device: values are converted to its dtype.
        vocab_multiple: Megatron's ``make_vocab_size_divisible_by``.

    Raises:
        UserError: a tensor is missing or has another shape, or ``out`` has; then nothing was filled.
    """
    entry = find_entry(name, shape)
    for hf_name, extent in zip(entry.hf_names, hf_shapes(entry.kind, shape), strict=True):
        reader.check(hf_name, extent)
    check_shard(name, out, shard_shape(entry.kind, shape, tp_size, vocab_multiple=vocab_multiple))
    pieces = boxes(entry.kind, shape, tp_rank, tp_size, vocab_multiple=vocab_multiple)
    with torch.no_grad():
        if sum(box.num_elements for box in pieces) < out.numel():
            out.zero_()
        for box in pieces:
            out[box.shard_slices].copy_(reader.read(entry.hf_names[box.tensor], box.hf_slices))


def check_shard(name: str, shard: Tensor, expected: Extent) -> None:
    """Check that a shard has the shape that the table gives it."""
    if tuple(shard.shape) != expected:
        raise UserError(
            f"Megatron parameter {name}",
            tuple(shard.shape),
            f"the weight table expects shape {expected}",
            "build the model from the same config.json, tensor-parallel size and vocabulary multiple",
        )


def check_coverage(
    shape: ModelShape, reader: TensorReader, *, tp_size: int = 1, vocab_multiple: int = DEFAULT_VOCAB_MULTIPLE
) -> None:
    """Check that everything in the checkpoint has a use, and every element of every shard exactly one source.

    Call it before the first ``load_parameter``. It reads headers, and the output layer where a tied model
    stores it.

    Raises:
        UserError: a tensor is missing, has the wrong shape or type, or nothing uses it.
    """
    expected = hf_tensors(shape)
    for hf_name, extent in expected.items():
        reader.check(hf_name, extent)
    unused = {name for name in reader.names - set(expected) if not _DERIVED.search(name)}
    if shape.tied and _OUTPUT in unused:
        _check_stored_copy(reader, expected[_EMBEDDING])
        unused.remove(_OUTPUT)
    if unused:
        raise UserError(
            f"{reader.directory}: {min(unused)}",
            None,
            f"nothing in a {shape.family} model uses this tensor ({len(unused)} such tensors)",
            "check that config.json describes these weights (bias fields, num_hidden_layers, model_type)",
        )
    for kind in {entry.kind for entry in entries(shape).values()}:
        check_tiling(kind, shape, tp_size, vocab_multiple=vocab_multiple)


def check_tiling(
    kind: ShardKind, shape: ModelShape, tp_size: int, *, vocab_multiple: int = DEFAULT_VOCAB_MULTIPLE
) -> None:
    """Check that the boxes of all ranks cover each HF tensor once, and those of each rank its shard once, padding apart.

    Raises:
        AssertionError: the kind is wrong; no input of a user can cause it.
    """
    shard = shard_shape(kind, shape, tp_size, vocab_multiple=vocab_multiple)
    by_rank = [boxes(kind, shape, rank, tp_size, vocab_multiple=vocab_multiple) for rank in range(tp_size)]
    # A replicated parameter is covered by each rank alone, any other by all of them together.
    sources = by_rank if kind.name == "replicated" else [[box for pieces in by_rank for box in pieces]]
    for tensor, extent in enumerate(hf_shapes(kind, shape)):
        for pieces in sources:
            _assert_tiles([(b.hf_start, b.size) for b in pieces if b.tensor == tensor], extent)
    for rank, pieces in enumerate(by_rank):
        first_padding_row = shape.vocab_size - rank * shard[0] if kind.name == "vocab" else shard[0]
        filled = (max(0, min(shard[0], first_padding_row)), *shard[1:])
        _assert_tiles([(b.shard_start, b.size) for b in pieces], filled)


def _assert_tiles(rectangles: list[tuple[Extent, Extent]], extent: Extent) -> None:
    """Check that (start, size) rectangles cover ``extent`` once: they lie within it, do not overlap, and have its area."""
    area = 0
    for start, size in rectangles:
        assert all(a >= 0 and n > 0 and a + n <= d for a, n, d in zip(start, size, extent, strict=True)), "outside"
        area += prod(size)
    for (start, size), (other, other_size) in combinations(rectangles, 2):
        assert any(a + n <= b or b + m <= a for a, n, b, m in zip(start, size, other, other_size)), "overlap"
    assert area == prod(extent), "gap"


def _check_stored_copy(reader: TensorReader, extent: Extent) -> None:
    """Check that an output layer stored again by a tied model's checkpoint is the embedding bit for bit."""
    reader.check(_OUTPUT, extent)
    step = max(1, _BLOCK_ELEMENTS // extent[1])
    for start in range(0, extent[0], step):
        rows = (slice(start, min(start + step, extent[0])), slice(0, extent[1]))
        output, embedding = reader.read(_OUTPUT, rows), reader.read(_EMBEDDING, rows)
        if output.dtype != embedding.dtype or not torch.equal(output, embedding):
            raise UserError(
                f"{reader.directory}: {_OUTPUT}",
                None,
                f"differs from {_EMBEDDING}, but config.json says that the two are tied",
                "set tie_word_embeddings to false in config.json, or remove the tensor",
            )
