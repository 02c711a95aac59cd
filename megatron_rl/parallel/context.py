"""Context parallelism: which rank holds which token of a pack, and how token vectors travel between ranks.

Every sequence of a pack is cut into ``2 * size`` equal chunks; rank r holds chunks r and ``2 * size - 1 - r``, so that early
(cheap) and late (dear) queries of causal attention are shared out evenly. With size 2 and one sequence of 8 tokens:

    tokens of the pack   0 1 2 3 4 5 6 7
    rank 0               0 1 . . . . 6 7        its own order: 0 1 6 7
    rank 1               . . 2 3 4 5 . .

Several sequences: each is cut for itself, and a rank holds its two chunks of the first, of the second, and so on. This is
the order that Transformer Engine's attention and Megatron's rotary embedding expect. Nothing else knows about it.

Legend: T tokens of the pack, t = T / size tokens of a rank, N sequences.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def zigzag_indices(cu_seqlens: Tensor, *, size: int, rank: int) -> Tensor:
    """Return [t] int64, the pack's tokens that a rank holds, in its own order.

    Args:
        cu_seqlens: [N + 1] borders of the sequences in the pack; each length is a multiple of ``2 * size``.
        size: of the context-parallel group.
        rank: in it.

    Raises:
        ValueError: a length that cannot be cut.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    if bool((lengths % (2 * size)).any()):
        raise ValueError(f"context parallelism of {size} needs lengths that {2 * size} divides, got {lengths.tolist()}")
    chunk = lengths // (2 * size)
    # A rank's part of a sequence is 2 chunks long; `within` counts its tokens, then jumps over the chunks between them.
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=chunk.device), 2 * chunk)
    first = torch.nn.functional.pad((2 * chunk).cumsum(0), (1, 0))[:-1]
    within = torch.arange(len(sequence), device=chunk.device) - first[sequence]
    own = chunk[sequence]
    is_late = within >= own
    place = torch.where(is_late, within - own + own * (2 * size - 1 - rank), within + own * rank)
    return starts[sequence] + place


def gather_order(cu_seqlens: Tensor, *, size: int) -> Tensor:
    """Return [T] int64, the place of each token of the pack in the concatenation of all ranks' tokens."""
    held = torch.cat([zigzag_indices(cu_seqlens, size=size, rank=rank) for rank in range(size)])
    order = torch.empty_like(held)
    order[held] = torch.arange(len(held), device=held.device)
    return order


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of the ranks' values, on every rank; differentiable.

    Its adjoint sums the gradients of all ranks: right for any loss that is summed over the ranks.

    Args:
        values: of this rank, of the same shape on each.
        group: the context-parallel ranks. None is refused: it would be all ranks of the run.
    """
    assert group is not None, "a pack that is cut over ranks was made without their group"
    return _AllReduce.apply(values, group)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
