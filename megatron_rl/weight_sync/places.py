"""Where the ranks of trainer and servers run: the machine decides over what two of them can exchange weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class GpuPlace(NamedTuple):
    """A machine, and a GPU of it."""

    node: int
    """Number of the machine; equal numbers share memory."""
    gpu: int | None = None
    """Number of the GPU on its machine; None on a CPU."""


@dataclass(frozen=True)
class Places:
    """The places of all ranks of trainer and servers."""

    trainer: tuple[GpuPlace, ...]
    """By world rank."""
    servers: tuple[GpuPlace, ...]
    """By receiver: server number times its tensor-parallel size, plus the rank in it."""

    @staticmethod
    def apart(num_ranks: int, num_receivers: int) -> Places:
        """Return places of a trainer on one machine and of server ranks that share none with it, nor with each other."""
        return Places((GpuPlace(0),) * num_ranks, tuple(GpuPlace(1 + receiver) for receiver in range(num_receivers)))

    @staticmethod
    def shared(num_ranks: int, num_receivers: int, *, per_node: int) -> Places:
        """Return places of servers on the trainer's own GPUs, both numbered through the machines in order."""
        return Places(_in_order(num_ranks, per_node), _in_order(num_receivers, per_node))


def _in_order(count: int, per_node: int) -> tuple[GpuPlace, ...]:
    return tuple(GpuPlace(*divmod(number, per_node)) for number in range(count))


def by_node(places: Sequence[GpuPlace]) -> dict[int, list[int]]:
    """Return the numbers of those on each machine, in order."""
    found: dict[int, list[int]] = {}
    for number, place in enumerate(places):
        found.setdefault(place.node, []).append(number)
    return found
