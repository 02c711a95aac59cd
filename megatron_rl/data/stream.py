"""The order in which a run sees its items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from megatron_rl.errors import UserError

T = TypeVar("T")


@dataclass
class Stream(Generic[T]):
    """Endless items: each epoch is a permutation that follows from (seed, epoch), so positions are the whole state."""

    items: Sequence[T | None]
    """One that is None is passed over: it was found to be unusable when it was asked for."""
    seed: int
    shuffle: bool
    cursor: int = 0
    """Positions taken so far."""
    returned: list[int] = field(default_factory=list)
    """Positions that were taken and put back; they come first."""
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)
    _taken: list[int] = field(default_factory=list, repr=False)

    def take(self, count: int) -> list[T]:
        """Return the next ``count`` items.

        Raises:
            UserError: none of the items can be used.
        """
        taken: list[T] = []
        self._taken = []
        num_passed = 0
        while len(taken) < count:
            if self.returned:
                position = self.returned.pop(0)
            else:
                position, self.cursor = self.cursor, self.cursor + 1
            item = self._at(position)
            if item is not None:
                taken.append(item)
                self._taken.append(position)
            elif (num_passed := num_passed + 1) > len(self.items):
                rule = f"none of the {len(self.items)} rows can be used: all are too long"
                raise UserError(
                    "data.train", None, rule, "raise data.max_prompt_tokens, or lower rollout.max_new_tokens"
                )
        return taken

    def put_back(self, indices: Sequence[int]) -> None:
        """Return items of the last ``take``, by their places in it: the next one begins with them."""
        self.returned = [self._taken[index] for index in indices] + self.returned

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint must keep."""
        return {"cursor": self.cursor, "returned": list(self.returned)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        self.cursor, self.returned = int(state["cursor"]), list(state.get("returned", []))

    def _at(self, position: int) -> T | None:
        epoch, index = divmod(position, len(self.items))
        if not self.shuffle:
            return self.items[index]
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.items), generator=generator).tolist())
        return self.items[self._order[1][index]]
