"""The order in which a run sees its items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


@dataclass
class Stream(Generic[Item]):
    """Endless items: each epoch is a permutation that follows from (seed, epoch), so the cursor is the whole state."""

    items: Sequence[Item]
    seed: int
    shuffle: bool
    cursor: int = 0
    """Items taken so far; saved with checkpoints."""
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)

    def take(self, count: int) -> list[Item]:
        """The next ``count`` items."""
        taken = [self._at(self.cursor + i) for i in range(count)]
        self.cursor += count
        return taken

    def _at(self, position: int) -> Item:
        epoch, index = divmod(position, len(self.items))
        if not self.shuffle:
            return self.items[index]
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.items), generator=generator).tolist())
        return self.items[self._order[1][index]]
