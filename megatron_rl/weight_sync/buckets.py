"""Buckets of a stream: its pieces one after the other in one run of memory, handed on one run at a time.

Both ends cut a stream into the same buckets. The sender gathers a bucket, each receiver copies what it takes from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.weight_sync.pieces import Piece
from megatron_rl.weight_sync.plan import Carried, WeightStream

ALIGNMENT = 32
"""Bytes; pieces begin at multiples of it, so that wide copies are possible."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A piece in a bucket."""

    piece: Piece
    carried: Carried
    start: int
    """First byte in the bucket."""


@dataclass(frozen=True)
class Bucket:
    """Pieces that are handed on at once."""

    placed: Sequence[Placed]
    num_bytes: int

    def fetched(self, sender: int) -> dict[int, tuple[int, int]]:
        """Return by rank the run of bytes [first, end) that the sender fetches from it."""
        runs: dict[int, tuple[int, int]] = {}
        for each in self.placed:
            origin, end = each.carried.origin, each.start + each.piece.num_bytes
            if origin != sender:
                runs[origin] = (runs[origin][0] if origin in runs else each.start, end)
        return runs

    def takers(self) -> set[int]:
        """Return the receivers that take something."""
        return {taker for each in self.placed for taker in each.carried.takers}


def buckets_of(stream: WeightStream) -> Iterator[Bucket]:
    """Yield the buckets of a stream, in order."""
    placed: list[Placed] = []
    end = 0
    for carried in stream.carried:
        for piece in carried.bundle.pieces():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if placed and start + piece.num_bytes > stream.bucket_bytes:
                yield Bucket(placed, end)
                placed, start = [], 0
            placed.append(Placed(piece, carried, start))
            end = start + piece.num_bytes
    if placed:
        yield Bucket(placed, end)


def box(start: Extent, size: Extent) -> tuple[int | slice, ...]:
    """Return the index of a rectangle. ``start`` may have more dimensions in front than ``size``: they are indices."""
    front = len(start) - len(size)
    return (*start[:front], *(slice(a, a + n) for a, n in zip(start[front:], size)))


class Source(Protocol):
    """The pieces of the servers' tensors that a trainer rank holds."""

    @property
    def device(self) -> torch.device:
        """Device of the pieces."""
        ...

    def piece(self, piece: Piece) -> Tensor:
        """Return a piece, [``piece.size``], in a dtype that copies to the server's without another rounding than its own."""
        ...


def gather(placed: Sequence[Placed], source: Source, run: Tensor, *, first: int = 0) -> None:
    """Copy pieces from a trainer rank into a run of memory.

    Args:
        placed: the pieces.
        source: of the rank.
        run: [n] uint8, the bucket's bytes from ``first`` on.
        first: the bucket's byte that the run begins with.
    """
    torch._foreach_copy_([_view(run, each, first) for each in placed], [source.piece(each.piece) for each in placed])


def scatter(placed: Sequence[Placed], run: Tensor, parameters: Mapping[str, Tensor], tp_rank: int) -> None:
    """Copy what one rank of a server takes from a bucket into its parameters.

    Args:
        placed: pieces that the rank takes.
        run: [n] uint8, the whole bucket.
        parameters: of the rank, by SGLang's name.
        tp_rank: of the rank in its server.
    """
    views, places = [], []
    for each in placed:
        for target in each.piece.targets:
            if target.tp_rank == tp_rank:
                views.append(_view(run, each, 0))
                places.append(parameters[target.name][box(target.start, each.piece.size)])
    torch._foreach_copy_(places, views)


def _view(run: Tensor, each: Placed, first: int) -> Tensor:
    piece, start = each.piece, each.start - first
    return run[start : start + piece.num_bytes].view(getattr(torch, piece.dtype_name)).view(piece.size)
