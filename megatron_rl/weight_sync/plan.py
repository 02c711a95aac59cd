"""The transfer plan: which trainer rank hands which bundles to which server ranks, each byte once and no byte in vain.

    stream    bundles that one trainer rank hands on: to all server ranks of its machine through memory, or to one
              elsewhere over the network

A plan is a function of the model's shape, both layouts and the places of all ranks. So every rank computes the same one without
communication, and a laptop computes it for any cluster.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.weight_sync.pieces import Bundle, ServedForm, TrainingLayout, make_bundles
from megatron_rl.weight_sync.places import GpuPlace, Places, by_node
from megatron_rl.weight_sync.served import RolloutLayout

CPU_BUCKET_BYTES = 4 * 2**20
"""Most bytes of a bucket on a CPU: it stays in the cache between the copy into it and the copy out of it."""


@dataclass(frozen=True)
class Carried:
    """A bundle in a stream."""

    bundle: Bundle
    takers: tuple[int, ...]
    """Receivers: server number times its tensor-parallel size, plus the rank in it."""
    origin: int
    """World rank that has it: the sender, or one on another machine that the sender fetches it from."""


@dataclass(frozen=True)
class WeightStream:
    """Bundles that one trainer rank hands on, in order."""

    sender: int
    """World rank."""
    is_local: bool
    """True: to receivers of its own machine. False: to one receiver elsewhere."""
    carried: tuple[Carried, ...]
    bucket_bytes: int
    """Most bytes that are handed on at once."""

    @cached_property
    def receivers(self) -> tuple[int, ...]:
        """All takers, in order."""
        return tuple(sorted({taker for carried in self.carried for taker in carried.takers}))


@dataclass(frozen=True)
class Plan:
    """All streams."""

    places: Places
    bundles: list[Bundle]
    streams: list[WeightStream]
    num_pieces: int
    held: int
    """Bytes of all server ranks' parameters, without padding of the vocabulary."""

    def origins(self) -> dict[int, int]:
        """Return by bundle a rank that gives it to somebody."""
        found: dict[int, int] = {}
        for stream in self.streams:
            for carried in stream.carried:
                found.setdefault(carried.bundle.number, carried.origin)
        return found

    def sent(self) -> dict[int, int]:
        """Return the bytes that each trainer rank hands on or gives to another one."""
        found: dict[int, int] = defaultdict(int)
        for stream in self.streams:
            for carried in stream.carried:
                found[stream.sender] += carried.bundle.num_bytes * len(carried.takers)
                if carried.origin != stream.sender:
                    found[carried.origin] += carried.bundle.num_bytes
        return dict(found)

    def received(self) -> dict[int, int]:
        """Return the bytes that each server rank gets."""
        found: dict[int, int] = defaultdict(int)
        for stream in self.streams:
            for carried in stream.carried:
                for taker in carried.takers:
                    found[taker] += carried.bundle.num_bytes
        return dict(found)

    def partners(self) -> dict[int, int]:
        """Return the number of trainer ranks that each server rank gets something from."""
        pairs = {(stream.sender, taker) for stream in self.streams for c in stream.carried for taker in c.takers}
        found: dict[int, int] = defaultdict(int)
        for _, taker in pairs:
            found[taker] += 1
        return dict(found)


def between_nodes(streams: Iterable[WeightStream], places: Places) -> int:
    """Return the bytes that go from one machine to another."""
    total = 0
    for stream in streams:
        node = places.trainer[stream.sender].node
        for carried in stream.carried:
            is_fetched = places.trainer[carried.origin].node != node
            elsewhere = [taker for taker in carried.takers if places.servers[taker].node != node]
            total += carried.bundle.num_bytes * (is_fetched + len(elsewhere))
    return total


def make_plan(
    shape: ModelShape,
    training: TrainingLayout,
    rollout: RolloutLayout,
    places: Places,
    form: ServedForm,
    *,
    bucket_bytes: int,
) -> Plan:
    """Return the plan.

    Args:
        shape: of the model.
        training: of the trainer.
        rollout: of the servers.
        places: of all ranks of both.
        form: of the servers' parameters.
        bucket_bytes: most bytes that a rank hands on at once.

    Raises:
        UserError: a layout does not fit the model.
    """
    assert len(places.trainer) == training.num_ranks and len(places.servers) == rollout.num_ranks, places
    bundles, num_pieces, held = make_bundles(shape, training, rollout, form, bucket_bytes)
    streams = list(_make_streams(bundles, rollout, places, bucket_bytes))
    return Plan(places, bundles, streams, num_pieces, held * rollout.num_servers)


def _make_streams(
    bundles: Sequence[Bundle], rollout: RolloutLayout, places: Places, bucket_bytes: int
) -> Iterator[WeightStream]:
    """Yield the streams: first local ones, then those over the network."""
    nodes = by_node(places.trainer)
    needed = [
        sorted((b for b in bundles if tp_rank in b.tp_ranks), key=lambda bundle: len(bundle.holders))
        for tp_rank in range(rollout.tp_size)
    ]
    local: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    remote: dict[tuple[int, int], list[int]] = defaultdict(list)
    relays: dict[tuple[int, int], tuple[int, int]] = {}
    origins: dict[int, set[int]] = defaultdict(set)
    for receiver, place in enumerate(places.servers):
        server, tp_rank = divmod(receiver, rollout.tp_size)
        near, partners = nodes.get(place.node, []), set[int]()
        for bundle in needed[tp_rank]:  # those that few hold come first
            turn = server * len(bundle.tp_ranks) + bundle.tp_ranks.index(tp_rank)
            here = [rank for rank in near if rank in bundle.holders]
            if not near:
                sender = _choose(bundle.holders, partners, turn)
                remote[sender, receiver].append(bundle.number)
            elif here:
                sender = _choose(_on_gpu(here, place, places) or here, partners, turn)
                local[sender][bundle.number, sender].append(receiver)
            else:  # comes to the machine once, by the rank whose GPU needs it first
                at = place.node, bundle.number
                if at not in relays:
                    sender = _choose(_on_gpu(near, place, places) or near, partners, turn)
                    relays[at] = sender, _choose(bundle.holders, origins[sender], turn)
                    origins[sender].add(relays[at][1])
                sender, origin = relays[at]
                local[sender][bundle.number, origin].append(receiver)
            partners.add(sender)
    given: dict[int, Counter[int]] = defaultdict(Counter)
    for (_, number), (sender, origin) in relays.items():
        given[origin][sender] += bundles[number].num_bytes
    # A rank gives all that ask for the same bucket at once.
    fan_out = max((round(to.total() / max(to.values())) for to in given.values()), default=1)
    lanes, sources = Counter(sender for sender, _ in remote), Counter(receiver for _, receiver in remote)

    def most_of(rank: int) -> int:
        return bucket_bytes if places.trainer[rank].gpu is not None else min(bucket_bytes, CPU_BUCKET_BYTES)

    for sender, carried in sorted(local.items()):
        # What is fetched from one rank is one run of bytes.
        parts = sorted(carried.items(), key=lambda item: (item[0][1] != sender, item[0][1], item[0][0]))
        carried_by_it = tuple(Carried(bundles[number], tuple(takers), origin) for (number, origin), takers in parts)
        yield WeightStream(sender, True, carried_by_it, most_of(sender) // fan_out)
    for (sender, receiver), numbers in sorted(remote.items()):
        carried_by_it = tuple(Carried(bundles[number], (receiver,), sender) for number in sorted(numbers))
        most = most_of(sender) // max(lanes[sender], sources[receiver])
        yield WeightStream(sender, False, carried_by_it, most)


def _choose(ranks: Sequence[int], partners: Collection[int], turn: int) -> int:
    """Choose among ranks that have the same: one that more comes from anyway, else each in turn."""
    known = [rank for rank in ranks if rank in partners] or ranks
    return known[turn % len(known)]


def _on_gpu(ranks: Sequence[int], place: GpuPlace, places: Places) -> list[int]:
    return [rank for rank in ranks if place.gpu is not None and places.trainer[rank].gpu == place.gpu]
