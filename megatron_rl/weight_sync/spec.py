"""The description of a transfer that the trainer hands to each rank of a server: numbers and names, as JSON."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from pydantic import TypeAdapter

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.weight_sync.pieces import ServedForm, TrainingLayout
from megatron_rl.weight_sync.places import Places
from megatron_rl.weight_sync.plan import Plan, WeightStream, make_plan
from megatron_rl.weight_sync.served import RolloutLayout


@dataclass(frozen=True)
class Transfer:
    """What goes from where to where: the same for all servers."""

    cargo: Literal["shards", "whole"]
    """Rectangles that ranks of a server lack, or whole tensors, of which SGLang loads each rank's part."""
    shape: ModelShape
    training: TrainingLayout
    rollout: RolloutLayout
    places: Places
    form: ServedForm
    bucket_bytes: int

    def plan(self) -> Plan:
        """Return the plan of shards."""
        return _plan_of(self)

    def whole_sender(self, receiver: int) -> int | None:
        """Return the trainer rank that hands whole tensors to a receiver through memory: on its GPU, else on its machine.

        None if there is no such rank: rank 0 sends over the network.
        """
        place = self.places.servers[receiver]
        near = [rank for rank, other in enumerate(self.places.trainer) if other.node == place.node]
        on_gpu = [rank for rank in near if place.gpu is not None and self.places.trainer[rank].gpu == place.gpu]
        return next(iter(on_gpu or near), None)


@dataclass(frozen=True)
class TransferSpec:
    """All that both ends must know alike."""

    host: str
    """Address of the trainer's store."""
    port: int
    store_key: str
    """Key of the ``SignedStore`` there, as hex digits; drawn for this trainer."""
    attempt: str
    """Prefix of this transfer's keys."""
    server: int
    transfer: Transfer
    network: Literal["gloo", "nccl"]
    """Means between machines; within one it is memory."""
    timeout_s: float

    @property
    def pair(self) -> str:
        """Cargo and server: what a process group is for."""
        return f"{self.transfer.cargo}/{self.server}"

    @property
    def receivers(self) -> range:
        """Receivers of this server, as ``Places`` numbers them."""
        tp_size = self.transfer.rollout.tp_size
        return range(self.server * tp_size, (self.server + 1) * tp_size)

    def senders(self) -> list[int]:
        """Return the trainer ranks that send to this server over the network, in order."""
        if self.transfer.cargo == "whole":
            return [0] if any(self.transfer.whole_sender(receiver) is None for receiver in self.receivers) else []
        streams = (stream for stream in self.transfer.plan().streams if not stream.is_local)
        return sorted({stream.sender for stream in streams if stream.receivers[0] in self.receivers})

    def readers(self, sender: int, servers: Collection[int]) -> list[int]:
        """Return the receivers, of servers that take part, that read whole tensors from a trainer rank's memory, in order."""
        tp_size = self.transfer.rollout.tp_size
        receivers = [server * tp_size + tp_rank for server in sorted(servers) for tp_rank in range(tp_size)]
        return [receiver for receiver in receivers if self.transfer.whole_sender(receiver) == sender]

    def key(self, what: str, tp_rank: int | None = None) -> str:
        """Return a key of this server's transfer in the store."""
        return f"{self.attempt}/{self.server}/{what}" + ("" if tp_rank is None else f"/{tp_rank}")

    def stream_key(self, sender: int) -> str:
        """Return the key of the memory that a trainer rank shares."""
        return f"{self.attempt}/memory/{sender}"

    def to_json(self) -> bytes:
        """Return the text for a server rank."""
        return _spec_type().dump_json(self)

    @staticmethod
    def from_json(text: bytes) -> TransferSpec:
        """Read the text of ``to_json``.

        Raises:
            ValueError: it is something else.
        """
        return _spec_type().validate_json(text, strict=False)


@lru_cache(maxsize=1)
def _spec_type() -> TypeAdapter[TransferSpec]:
    return TypeAdapter(TransferSpec)


@lru_cache(maxsize=1)
def _plan_of(what: Transfer) -> Plan:
    """Return the plan, computed once for each layout."""
    return make_plan(what.shape, what.training, what.rollout, what.places, what.form, bucket_bytes=what.bucket_bytes)


def streams_to(plan: Plan, servers: Collection[int], tp_size: int) -> Iterator[WeightStream]:
    """Yield the plan's streams as far as they go to some servers; those that take part in a transfer agree on them."""
    for stream in plan.streams:
        kept = [
            replace(carried, takers=takers)
            for carried in stream.carried
            if (takers := tuple(taker for taker in carried.takers if taker // tp_size in servers))
        ]
        if kept:
            yield replace(stream, carried=tuple(kept))
