"""What every rollout engine does: token ids in, token ids and log-probs out, under a stated version of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from megatron_rl.types import Completion, Request


class RolloutEngine(Protocol):
    """Every method is a collective: all ranks call it, in the same order, with equal arguments."""

    @property
    def weight_version(self) -> int:
        """Publish counter of the weights that ``generate`` samples from; -1 before the first ``update_weights``."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete every request.

        Returns:
            One completion per request, in order, the same list on every rank.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights.

        Args:
            named_tensors: Hugging Face names and full tensors; consumed to the end on every rank.
            version: the publish counter that completions will carry from now on.
        """
        ...

    def release_memory(self) -> None:
        """Give up what generation alone needs (caches), until ``resume_memory``."""
        ...

    def resume_memory(self) -> None:
        """Undo ``release_memory``."""
        ...

    def health(self) -> str | None:
        """None when the engine can serve, else what is wrong."""
        ...

    def close(self) -> None:
        """Stop what the engine has started. Safe to call twice."""
        ...
