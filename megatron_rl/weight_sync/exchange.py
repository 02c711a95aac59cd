"""The exchange between trainer ranks before servers get anything: to each machine once what no rank of it holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.weight_sync.buckets import Bucket, Placed, Source, buckets_of, gather
from megatron_rl.weight_sync.plan import WeightStream


class Exchange:
    """What trainer ranks fetch from each other, once a machine, because none there holds what its servers need."""

    def __init__(self, streams: Sequence[WeightStream], rank: int) -> None:
        """Args: all streams of a transfer, and this rank."""
        self._gives: dict[int, list[tuple[int, list[Placed]]]] = {}
        for stream in streams:
            if stream.sender == rank or all(carried.origin != rank for carried in stream.carried):
                continue
            for number, bucket in enumerate(buckets_of(stream)):
                if placed := [each for each in bucket.placed if each.carried.origin == rank]:
                    self._gives.setdefault(number, []).append((stream.sender, placed))
        self._rank = rank
        self.num_steps = 1 + max(self._gives, default=-1)

    def step(
        self,
        number: int,
        source: Source,
        *,
        bucket: Bucket | None,
        buffer: Tensor | None,
    ) -> None:
        """Give others what they need for their bucket of this number, and fetch what this rank's lacks.

        Args:
            number: of the bucket.
            parameters: of this rank, by global Megatron name.
            bucket: of this rank's local stream, if it has one of this number.
            buffer: [n] bytes, of that bucket.
        """
        operations = []
        for to, placed in self._gives.get(number, ()):
            first, last = placed[0].start, placed[-1]
            run = torch.empty(last.start + last.piece.num_bytes - first, dtype=torch.uint8, device=source.device)
            gather(placed, source, run, first=first)
            operations.append(dist.P2POp(dist.isend, run, to))
        if bucket is not None and buffer is not None:
            for origin, (start, end) in bucket.fetched(self._rank).items():
                operations.append(dist.P2POp(dist.irecv, buffer[start:end], origin))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
