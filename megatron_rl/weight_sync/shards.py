"""Shard-to-shard updates, the trainer's end: every rank hands on what servers lack, and rank 0 compares digests.

Servers of a machine with trainer ranks read from their memory; what no rank there holds is fetched by one of them first, over
the trainer's own groups. Servers elsewhere get it over a process group (``meeting``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.digest import as_text, digest_on_device, digests_of
from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.parallel.agree import gather_json
from megatron_rl.process import activity
from megatron_rl.weight_sync.buckets import Bucket, buckets_of, gather
from megatron_rl.weight_sync.exchange import Exchange
from megatron_rl.weight_sync.fp8_format import is_quantized
from megatron_rl.weight_sync.meeting import Delivery, Post, ServerMeeting
from megatron_rl.weight_sync.outlets import LocalOutlet, NetworkOutlet
from megatron_rl.weight_sync.pieces import Piece, ServedForm, TrainingLayout
from megatron_rl.weight_sync.plan import WeightStream, between_nodes
from megatron_rl.weight_sync.receiver import decode
from megatron_rl.weight_sync.served import RolloutLayout
from megatron_rl.weight_sync.shared import BufferPool
from megatron_rl.weight_sync.sources import PieceSource, agreed_scales
from megatron_rl.weight_sync.spec import Transfer, TransferSpec, streams_to


class ShardSender:
    """Sender of shards of the current weights to servers. Every method is a collective."""

    def __init__(
        self,
        parameters: Callable[[], Mapping[str, Tensor]],
        shape: ModelShape,
        training: TrainingLayout,
        meeting: ServerMeeting,
        *,
        form: ServedForm,
        device: torch.device,
    ) -> None:
        """Args:
        parameters: gives this rank's, by global Megatron name, as they are now.
        shape: of the model.
        training: of the trainer.
        meeting: of this trainer and its servers.
        form: of the servers' parameters.
        device: of this rank.
        """
        self._parameters, self._shape, self._training = parameters, shape, training
        self._meeting, self._form, self._device = meeting, form, device
        self._rank, self._cpu_group = meeting.rank, meeting.cpu_group
        num_ranks = dist.get_world_size(self._cpu_group)
        assert training.num_ranks == num_ranks, f"{training} on {num_ranks} ranks"
        self._is_exchange_ready = self._device.type == "cpu"
        self._rollout, self._pool = RolloutLayout(num_servers=0), BufferPool(device)
        self.metrics: dict[str, float] = {}
        """Figures of the last ``send``: bytes, seconds, servers proven."""

    def send(self, servers: Sequence[int], layout: RolloutLayout, *, post: Post | None) -> dict[int, Delivery]:
        """Send the current weights to servers, and compare digests of both ends.

        Args:
            servers: numbers within the layout, the same on every rank.
            layout: of all servers of the engine.
            post: on rank 0; None on other ranks.

        Returns:
            The outcome by server, the same on every rank. The caller puts only proven servers into service.
        """
        try:
            self._prepare(layout)
        except UserError as error:  # the same on every rank
            return {server: Delivery("unfit", str(error)) for server in servers}
        self.metrics.clear()
        specs, futures = self._meeting.invite(servers, self._what, post)
        there, deliveries = self._meeting.join(specs, futures)
        with self._clock("send"):
            source = self._source()
            failures = self._transfer(specs, [s for s in there if s not in deliveries], there, source)
        deliveries |= self._meeting.agree(failures)
        with self._clock("digest"):
            expected = self._digests(source)
        whole = [server for server in there if server not in deliveries]
        deliveries |= self._meeting.conclude(whole, specs, futures, lambda _, reports: self._judge(reports, expected))
        self._meeting.forget_groups(specs, deliveries)
        self.metrics["weight_sync/servers_proven"] = float(len([d for d in deliveries.values() if d.is_good]))
        return deliveries

    def _prepare(self, rollout: RolloutLayout) -> None:
        """Compute the plan, once for each layout of the servers."""
        if rollout == self._rollout:
            return
        rendezvous = self._meeting.rendezvous
        places, bucket_bytes = rendezvous.places(rollout), rendezvous.bucket_bytes
        self._what = Transfer("shards", self._shape, self._training, rollout, places, self._form, bucket_bytes)
        self._plan = self._what.plan()
        self._origins = self._plan.origins()
        self._rollout = rollout

    # ------------------------------------------------------------------------------------------------ the steps of send

    def _transfer(
        self,
        specs: Mapping[int, TransferSpec],
        alive: Sequence[int],
        there: Sequence[int],
        source: PieceSource,
    ) -> dict[int, str]:
        """Hand on all buckets; return by server why it has not got everything from this rank."""
        streams = list(streams_to(self._plan, set(there), self._rollout.tp_size))
        mine = [stream for stream in streams if stream.sender == self._rank]
        lanes = [(list(buckets_of(stream)), stream) for stream in mine]
        outlets = [
            (buckets, self._outlet(number, stream, buckets, specs, alive))
            for number, (buckets, stream) in enumerate(lanes)
        ]
        exchange = Exchange(streams, self._rank)
        if not self._is_exchange_ready and any(c.origin != s.sender for s in streams for c in s.carried):
            # NCCL makes a group's communicator in its first collective; in a batch of some ranks the others would be missed.
            dist.all_reduce(torch.zeros(1, device=self._device))
            self._is_exchange_ready = True
        num_sent = 0
        for number in range(max([exchange.num_steps, *(len(buckets) for buckets, _ in outlets)])):
            due = [
                (buckets[number], outlet, outlet.room(number)) for buckets, outlet in outlets if number < len(buckets)
            ]
            local = next(
                ((bucket, run) for bucket, outlet, run in due if isinstance(outlet, LocalOutlet)), (None, None)
            )
            exchange.step(number, source, bucket=local[0], buffer=local[1])
            for bucket, outlet, run in due:
                if own := [each for each in bucket.placed if each.carried.origin == self._rank]:
                    gather(own, source, run)
                outlet.hand_on(number, bucket.num_bytes)
                num_sent += sum(each.piece.num_bytes * len(each.carried.takers) for each in bucket.placed)
            activity.beat()
        for buckets, outlet in outlets:
            outlet.finish(len(buckets))
        totals = gather_json(num_sent, self._cpu_group)
        self.metrics["weight_sync/sent_bytes"] = float(sum(totals))
        self.metrics["weight_sync/between_nodes_bytes"] = float(between_nodes(streams, self._what.places))
        return {server: detail for _, outlet in outlets for server, detail in outlet.failures.items()}

    def _outlet(
        self,
        number: int,
        stream: WeightStream,
        buckets: Sequence[Bucket],
        specs: Mapping[int, TransferSpec],
        alive: Sequence[int],
    ) -> LocalOutlet | NetworkOutlet:
        tp_size, limit_s = self._rollout.tp_size, self._meeting.rendezvous.timeout_s
        largest = max(bucket.num_bytes for bucket in buckets)
        if stream.is_local:
            outlet = LocalOutlet(
                [receiver // tp_size for receiver in stream.receivers], largest, pool=self._pool, limit_s=limit_s,
                problem=lambda server: self._meeting.problem(specs[server]),
            )  # fmt: skip
            key = next(iter(specs.values())).stream_key(self._rank)
            self._meeting.store.set(key, json.dumps(outlet.handle()))
            return outlet
        server, tp_rank = divmod(stream.receivers[0], tp_size)
        spec = specs[server]
        return NetworkOutlet(
            self._meeting.group(spec), len(spec.senders()) + tp_rank, largest, server=server, pool=self._pool,
            number=number, limit_s=limit_s, failure="" if server in alive else "its group was not made",
        )  # fmt: skip

    def _own_pieces(self) -> list[Piece]:
        """Return pieces that this rank answers for: each is one rank's."""
        bundles = [bundle for bundle in self._plan.bundles if self._origins[bundle.number] == self._rank]
        return [piece for bundle in bundles for piece in bundle.pieces()]

    def _source(self) -> PieceSource:
        """Return the current weights, in the servers' form."""
        parameters, fp8 = self._parameters(), self._form.fp8
        dtype = getattr(torch, self._form.trained)
        if fp8 is None:
            return PieceSource(parameters, dtype)
        extents = {name: extent for name, extent in hf_tensors(self._shape).items() if is_quantized(name, extent)}
        pieces = (piece for piece in self._own_pieces() if piece.form == "fp8")
        return PieceSource(parameters, dtype, agreed_scales(extents, pieces, parameters, fp8, self._cpu_group))

    def _digests(self, source: PieceSource) -> list[int]:
        """Return the digest of every piece, by its number; one of its holders computes each."""
        table = numpy.zeros(self._plan.num_pieces, dtype=numpy.uint64)
        mine = self._own_pieces()
        table[[piece.number for piece in mine]] = digests_of(
            digest_on_device(piece.hf_name, source.piece(piece), piece.hf_start, piece.hf_extent) for piece in mine
        )
        summed = torch.from_numpy(table.view(numpy.int64))
        dist.all_reduce(summed, group=self._cpu_group)
        return table.tolist()

    def _judge(self, reports: Sequence[dict[str, Any]], expected: Sequence[int]) -> Delivery:
        """Compare the digests of a server's ranks with the trainer's."""
        for tp_rank, report in enumerate(reports):
            mine = sorted(n for bundle in self._plan.bundles if tp_rank in bundle.tp_ranks for n in bundle.numbers())
            for number, found in zip(mine, decode(report["digests"]), strict=True):
                if found != expected[number]:
                    return Delivery("mismatch", self._describe(number, tp_rank, expected[number], found))
            for name in ("receive_s", "digest_s"):
                key = f"weight_sync/{name}"
                self.metrics[key] = max(self.metrics.get(key, 0.0), report[name])
        return Delivery("proven", "")

    def _describe(self, number: int, tp_rank: int, expected: int, found: int) -> str:
        bundle = next(bundle for bundle in self._plan.bundles if number in bundle.numbers())
        piece = next(piece for piece in bundle.pieces() if piece.number == number)
        target = next(target for target in piece.targets if target.tp_rank == tp_rank)
        end = [a + n for a, n in zip(piece.hf_start, piece.size)]
        where = ", ".join(f"{a}:{b}" for a, b in zip(piece.hf_start, end))
        return (
            f"{piece.hf_name}[{where}] has digest {as_text(found)} on rank {tp_rank} of the server ({target.name}) and "
            f"{as_text(expected)} on trainer rank {self._origins[bundle.number]} ({piece.source})"
        )

    @contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.metrics[f"weight_sync/{what}_s"] = time.monotonic() - started
