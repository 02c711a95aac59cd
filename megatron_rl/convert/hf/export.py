"""Joins Megatron shards into HF tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.hf.load import check_shard
from megatron_rl.convert.hf.writer import HFWriter
from megatron_rl.convert.tables.kinds import DEFAULT_VOCAB_MULTIPLE, boxes, hf_shapes, shard_shape
from megatron_rl.convert.tables.table import find_entry


def merge_parameter(
    name: str, shards: list[Tensor], shape: ModelShape, *, vocab_multiple: int = DEFAULT_VOCAB_MULTIPLE
) -> dict[str, Tensor]:
    """Return the HF tensors of one Megatron parameter; the inverse of ``load_parameter`` over all ranks.

    Args:
        name: global Megatron name.
        shards: the parameter on each tensor-parallel rank, in rank order, on one device.
        shape: of the model.
        vocab_multiple: Megatron's ``make_vocab_size_divisible_by``.

    Returns:
        New tensors in the shards' dtype, by HF name. Empty for the copy of a tied embedding: its owner gives it.

    Raises:
        UserError: an unknown name, or a shard of another shape.
        RuntimeError: ranks disagree on a replicated parameter, which training must keep equal.
    """
    entry = find_entry(name, shape)
    expected = shard_shape(entry.kind, shape, len(shards), vocab_multiple=vocab_multiple)
    for shard in shards:
        check_shard(name, shard, expected)
    if entry.is_copy:
        return {}
    if entry.kind.name == "replicated":
        _check_replicas(name, shards)
        shards = shards[:1]
    merged = [shards[0].new_empty(extent) for extent in hf_shapes(entry.kind, shape)]
    with torch.no_grad():
        for rank, shard in enumerate(shards):
            for box in boxes(entry.kind, shape, rank, len(shards), vocab_multiple=vocab_multiple):
                merged[box.tensor][box.hf_slices].copy_(shard[box.shard_slices])
    return dict(zip(entry.hf_names, merged, strict=True))


def _check_replicas(name: str, shards: list[Tensor]) -> None:
    """Check that replicas are equal bit for bit, NaN included."""
    first = shards[0].detach().contiguous().view(torch.uint8)
    for rank, shard in enumerate(shards[1:], start=1):
        if not torch.equal(first, shard.detach().contiguous().view(torch.uint8)):
            raise RuntimeError(
                f"{name} differs between tensor-parallel ranks 0 and {rank}, but is replicated: its gradient was not "
                "summed over the ranks (under sequence parallelism Megatron does so in finalize_model_grads)"
            )


__all__ = ["HFWriter", "merge_parameter"]
