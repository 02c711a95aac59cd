"""The transfer plan: the copies that turn a trainer's shards into a server's, each byte once and no byte in vain.

A plan is a function of the model's shape and both layouts alone. So every rank computes the same one without communication,
and a laptop computes it for any cluster. Both sides are boxes of Hugging Face tensors (``convert.tables.kinds`` for
Megatron, ``served`` for SGLang); a copy is the overlap of two boxes.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import Extent, boxes
from megatron_rl.convert.tables.table import Entry, entries
from megatron_rl.weight_sync.served import RolloutLayout, ServedParameter, served_parameters


@dataclass(frozen=True)
class TrainingLayout:
    """Megatron's ranks: tensor parallel inside context and data parallel inside pipeline parallel."""

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    """Ranks with the same weights, except for experts: data times context parallel size."""
    vpp_size: int = 1
    ep_size: int = 1
    etp_size: int | None = None
    """Tensor-parallel size of each expert; ``tp_size`` unless given."""

    @property
    def num_ranks(self) -> int:
        """World size."""
        return self.tp_size * self.dp_size * self.pp_size

    @property
    def expert_tp_size(self) -> int:
        """Ranks that each expert is cut over."""
        return self.tp_size if self.etp_size is None else self.etp_size

    def stage_of(self, entry: Entry, num_layers: int) -> int:
        """Return the pipeline rank that holds a parameter."""
        name = entry.name
        if name.startswith("decoder.layers."):
            chunk = int(name.split(".", 3)[2]) // (num_layers // (self.pp_size * self.vpp_size))
            return chunk % self.pp_size
        return 0 if name.startswith("embedding.") else self.pp_size - 1

    def holders(self, entry: Entry, shape: ModelShape) -> list[tuple[int, int, list[int]]]:
        """Return (rank in the cut, its size, world ranks with that shard) for each shard of a parameter."""
        per_stage = self.tp_size * self.dp_size
        first = self.stage_of(entry, shape.num_layers) * per_stage
        if entry.expert is None:
            return [
                (rank, self.tp_size, list(range(first + rank, first + per_stage, self.tp_size)))
                for rank in range(self.tp_size)
            ]
        cut, owner = self.expert_tp_size, entry.expert // (shape.num_experts // self.ep_size)
        step = cut * self.ep_size
        return [(rank, cut, list(range(first + owner * cut + rank, first + per_stage, step))) for rank in range(cut)]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A rectangle that a trainer's parameter and a server rank's parameter share; the same for every server."""

    index: int
    hf_name: str
    hf_start: Extent
    size: Extent
    """Size in the dimensions of the Hugging Face tensor, as ``hf_start``."""
    source: str
    """Global Megatron name of the parameter."""
    source_start: Extent
    target: str
    """SGLang's name of the parameter."""
    target_start: Extent
    """Corner in that parameter; may have one more dimension in front, the expert's place."""
    tp_rank: int
    """Rank in the server."""
    holders: tuple[int, ...]
    """World ranks of the trainer that have it."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One overlap, from a trainer's rank to a server's."""

    sender: int
    """World rank of the trainer."""
    receiver: int
    """Server number times its tensor-parallel size, plus the rank in it."""
    overlap: Overlap


@dataclass
class Plan:
    """All copies, server by server, overlap by overlap."""

    overlaps: list[Overlap]
    copies: list[Copy]
    sent: dict[int, int] = field(default_factory=dict)
    """Elements that each trainer rank sends."""
    received: dict[int, int] = field(default_factory=dict)
    """Elements that each server rank gets."""
    held: int = 0
    """Elements of all server ranks' parameters, without padding of the vocabulary."""

    @property
    def received_ratio(self) -> float:
        """Received over held: 1.0 if nothing is missing or sent in vain."""
        return sum(self.received.values()) / self.held

    @property
    def balance(self) -> float:
        """The busiest sender's load over the mean load of all ranks that send."""
        return max(self.sent.values()) * len(self.sent) / sum(self.sent.values())


def make_plan(shape: ModelShape, training: TrainingLayout, rollout: RolloutLayout) -> Plan:
    """Return the plan.

    Args:
        shape: of the model.
        training: of the trainer.
        rollout: of the servers.

    Raises:
        UserError: a layout does not fit the model.
    """
    served = [served_parameters(shape, rollout, tp_rank) for tp_rank in range(rollout.tp_size)]
    overlaps = list(_overlaps(_sources(shape, training), served))
    count = len(overlaps)
    loads: dict[int, int] = dict.fromkeys(range(training.num_ranks), 0)
    received: dict[int, int] = defaultdict(int)
    senders = [0] * (count * rollout.num_servers)
    # Largest first, each to the holder that has sent least: the last ones are small enough to level the loads.
    for index in sorted(range(len(senders)), key=lambda i: -prod(overlaps[i % count].size)):
        overlap = overlaps[index % count]
        senders[index] = min(overlap.holders, key=loads.__getitem__)
        loads[senders[index]] += prod(overlap.size)
    copies = []
    for index, sender in enumerate(senders):
        server, number = divmod(index, count)
        overlap = overlaps[number]
        receiver = server * rollout.tp_size + overlap.tp_rank
        received[receiver] += prod(overlap.size)
        copies.append(Copy(sender, receiver, overlap))
    served_boxes = (box for of_rank in served for parameter in of_rank for box in parameter.boxes)
    held = sum(prod(box.size) for box in served_boxes) * rollout.num_servers
    return Plan(overlaps, copies, {rank: load for rank, load in loads.items() if load}, dict(received), held)


def _overlaps(sources: dict[str, list[_TrainerBox]], served: list[list[ServedParameter]]) -> Iterator[Overlap]:
    count = 0
    for tp_rank, parameters in enumerate(served):
        for parameter in parameters:
            for box in parameter.boxes:
                for source in sources[box.hf_name]:
                    shared = _meet(box.hf_start, box.size, source.hf_start, source.size)
                    if shared is None:
                        continue
                    start, size = shared
                    source_start = _shift(start, source.hf_start, source.start)
                    target_start = _shift(start, box.hf_start, box.start)
                    yield Overlap(
                        count, box.hf_name, start, size, source.name, source_start, parameter.name, target_start, tp_rank,
                        tuple(source.ranks),
                    )  # fmt: skip
                    count += 1


@dataclass(frozen=True, slots=True)
class _TrainerBox:
    """A box of a Hugging Face tensor, and the ranks that hold it."""

    name: str
    start: Extent
    hf_start: Extent
    size: Extent
    ranks: list[int]


def _sources(shape: ModelShape, training: TrainingLayout) -> dict[str, list[_TrainerBox]]:
    found: dict[str, list[_TrainerBox]] = defaultdict(list)
    for entry in entries(shape).values():
        if entry.is_copy:
            continue
        for rank, size, ranks in training.holders(entry, shape):
            for box in boxes(entry.kind, shape, rank, size):
                source = _TrainerBox(entry.name, box.shard_start, box.hf_start, box.size, ranks)
                found[entry.hf_names[box.tensor]].append(source)
            if entry.kind.name == "replicated":  # every rank of the cut has all of it
                found[entry.hf_names[0]][-1].ranks.extend(
                    r for other, _, more in training.holders(entry, shape) if other != rank for r in more
                )
                break
    return found


def _meet(a_start: Extent, a_size: Extent, b_start: Extent, b_size: Extent) -> tuple[Extent, Extent] | None:
    """Return start and size of the overlap of two rectangles, or None."""
    start = tuple(map(max, a_start, b_start))
    size = tuple(min(a + n, b + m) - s for a, n, b, m, s in zip(a_start, a_size, b_start, b_size, start, strict=True))
    return (start, size) if min(size) > 0 else None


def _shift(start: Extent, origin: Extent, place: Extent) -> Extent:
    """Move a corner with its rectangle from ``origin`` to ``place``, which may have more dimensions in front."""
    front = len(place) - len(origin)
    return (*place[:front], *(p + s - o for p, s, o in zip(place[front:], start, origin, strict=True)))


def rounds(plan: Plan) -> Iterator[list[Copy]]:
    """Yield copies in rounds: each rank sends to at most one rank and receives from at most one; big pairs first."""
    pairs: dict[tuple[int, int], list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        pairs[copy.sender, copy.receiver].append(copy)
    heap = [(-sum(prod(c.overlap.size) for c in of_pair), pair) for pair, of_pair in pairs.items()]
    heapq.heapify(heap)
    while heap:
        busy_senders: set[int] = set()
        busy_receivers: set[int] = set()
        later, now = [], []
        while heap:
            item = heapq.heappop(heap)
            sender, receiver = item[1]
            if sender in busy_senders or receiver in busy_receivers:
                later.append(item)
                continue
            busy_senders.add(sender)
            busy_receivers.add(receiver)
            now += pairs[item[1]]
        yield now
        heap = later
        heapq.heapify(heap)
