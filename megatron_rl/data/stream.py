"""The order in which a run sees its items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass
class Stream(Generic[T]):
    """Endless items: each epoch is a permutation that follows from (seed, epoch), so positions are the whole state."""

    items: Sequence[T]
    seed: int
    shuffle: bool
    cursor: int = 0
    """Positions taken so far."""
    returned: list[int] = field(default_factory=list)
    """Positions that were taken and put back; they come first."""
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)
    _taken: list[int] = field(default_factory=list, repr=False)

    def take(self, count: int) -> list[T]:
        """Return the next ``count`` items."""
        again, self.returned = self.returned[:count], self.returned[count:]
        fresh = count - len(again)
        positions = [*again, *range(self.cursor, self.cursor + fresh)]
        self.cursor += fresh
        self._taken = positions
        return [self._at(position) for position in positions]

    def put_back(self, indices: Sequence[int]) -> None:
        """Return items of the last ``take``, by their places in it: the next one begins with them."""
        self.returned = [self._taken[index] for index in indices] + self.returned

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint must keep."""
        return {"cursor": self.cursor, "returned": list(self.returned)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        self.cursor, self.returned = int(state["cursor"]), list(state.get("returned", []))

    def _at(self, position: int) -> T:
        epoch, index = divmod(position, len(self.items))
        if not self.shuffle:
            return self.items[index]
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.items), generator=generator).tolist())
        return self.items[self._order[1][index]]
