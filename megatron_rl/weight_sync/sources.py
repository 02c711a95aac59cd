"""The trainer's side of pieces: its weights as they are, or rounded to eight bits with scales that all ranks agree on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.parallel.agree import all_ranks_agree
from megatron_rl.weight_sync.buckets import box
from megatron_rl.weight_sync.fp8_format import BLOCK, Fp8Format, grid
from megatron_rl.weight_sync.pieces import Piece
from megatron_rl.weight_sync.quantize import block_amax, cast, scales


class PieceSource:
    """Pieces of a trainer rank. A ``buckets.Source``."""

    def __init__(
        self, parameters: Mapping[str, Tensor], dtype: torch.dtype, quantized: Mapping[str, Tensor] | None = None
    ) -> None:
        """Args: weights of the rank, by global Megatron name; the servers' dtype; scales by name, of ``agreed_scales``."""
        self._parameters, self._dtype, self._scales = parameters, dtype, quantized or {}

    @cached_property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(iter(self._parameters.values())).device

    def piece(self, piece: Piece) -> Tensor:
        """Return a piece of this rank's, [``piece.size``]."""
        if piece.form == "scales":
            return self._scales[piece.hf_name][box(piece.start, piece.size)]
        block = self._parameters[piece.source][box(piece.start, piece.size)]
        if piece.form == "trained":
            return block.to(self._dtype)
        touched = tuple(
            slice(start // BLOCK, end)
            for start, end in zip(piece.hf_start, grid(tuple(a + n for a, n in zip(piece.hf_start, piece.size))))
        )
        return cast(block, self._scales[f"{piece.hf_name}_scale_inv"][touched], piece.hf_start)


def agreed_scales(
    extents: Mapping[str, Extent],
    pieces: Iterable[Piece],
    parameters: Mapping[str, Tensor],
    fmt: Fp8Format,
    group: dist.ProcessGroup,
) -> dict[str, Tensor]:
    """Return the scales of all quantised weights on every rank, the same as of whole tensors. A collective.

    A block may be cut between ranks: its largest number is the largest of theirs.

    Args:
        extents: shape of each quantised tensor, by Hugging Face name, in the same order on every rank.
        pieces: of this rank, in eight bits; those of all ranks cover everything.
        parameters: of this rank, by global Megatron name.
        fmt: the format, with scales of blocks.
        group: all ranks, over gloo.

    Returns:
        float32 [block rows, block columns] on the device of the weights, by the name of the scales.

    Raises:
        UserError: on all ranks; a weight holds infinities or NaN.
    """
    device = next(iter(parameters.values())).device
    counts = [prod(grid(extent)) for extent in extents.values()]
    flat = torch.zeros(sum(counts), device=device)
    largest = {name: part.view(grid(extent)) for (name, extent), part in zip(extents.items(), flat.split(counts))}
    with all_ranks_agree(group):
        for piece in pieces:
            found = block_amax(piece.hf_name, parameters[piece.source][box(piece.start, piece.size)], piece.hf_start)
            first = tuple(place // BLOCK for place in piece.hf_start)
            mine = largest[piece.hf_name][box(first, tuple(found.shape))]
            torch.maximum(mine, found, out=mine)
    summed = flat.cpu()
    dist.all_reduce(summed, dist.ReduceOp.MAX, group=group)
    flat.copy_(scales(summed, fmt))
    return {fmt.scale_name(name): tensor for name, tensor in largest.items()}
