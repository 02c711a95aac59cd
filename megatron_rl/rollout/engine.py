"""What every rollout engine does: token ids in, token ids and log-probs out, under a stated version of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.rollout.growth import Branch, Expand, Key
from megatron_rl.types import Completion, Request

WeightSource = Callable[[], Iterable[tuple[str, Tensor]]]
"""Gives all current weights, Hugging Face names and full tensors, each time it is called. A collective; every rank
consumes it to the end. Valid until the next optimizer update."""


CheckpointSource = Callable[[], str]
"""Writes the current weights as a Hugging Face checkpoint, once for each version, and says where. A collective."""


@dataclass(frozen=True)
class ServedModel:
    """What an engine generates from: a model's config, and how its tokens are read."""

    path: Path
    """Directory with config.json."""
    shape: ModelShape
    dtype: torch.dtype
    """Of weights and activations."""
    stop_ids: tuple[int, ...]
    """Token ids that end a response (they are part of it)."""
    pad_id: int = 0
    """Fills batches; never part of a response."""
    longest_request: int = 0
    """Tokens of the longest prompt and response that will be asked for; 0 where nobody knows."""
    records_experts: bool = False
    """Completions say which experts were chosen."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that servers read otherwise than they stand there, such as ``quantization_config``."""

    @property
    def experts(self) -> tuple[int, int] | None:
        """Layers, and experts of each that a token is sent to, where completions tell them."""
        return (self.shape.num_layers, self.shape.num_experts_per_tok) if self.records_experts else None


@dataclass(frozen=True)
class Delivery:
    """What became of an update of one server's weights, shard to shard."""

    state: Literal["proven", "mismatch", "failed", "unfit"]
    """``proven``: both ends have the same digests. ``unfit``: the server's parameters are not cut as the plan says, and
    nothing was sent."""
    detail: str
    """For people; empty if proven."""


class ShardSource(Protocol):
    """Sends this trainer's shards straight to the ranks of servers."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the last ``send``, by full name."""
        ...

    def send(
        self,
        servers: Sequence[int],
        *,
        num_servers: int,
        tp_size: int,
        ep_size: int,
        post: Callable[[int, bytes], Future[str | None]] | None,
    ) -> dict[int, Delivery]:
        """Send the current weights to some servers and compare digests. A collective.

        Args:
            servers: numbers, the same on every rank.
            num_servers: all there are.
            tp_size: ranks of each.
            ep_size: of these, groups that share the experts out.
            post: on rank 0, hands a payload to all ranks of a server; resolves to None once they are done with it, or to
                what the server said instead. None on other ranks.

        Returns:
            How it went, by server, the same on every rank.
        """
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Every method is a collective: all ranks call it, in the same order, with equal arguments."""

    @property
    def weight_version(self) -> int:
        """Publish counter of the weights that ``generate`` samples from; -1 before the first ``update_weights``."""
        ...

    def generate(
        self, requests: Sequence[Request], *, group_size: int = 1, num_groups: int | None = None
    ) -> list[Completion | None]:
        """Complete requests, all of them or until enough groups are whole.

        Args:
            requests: consecutive ``group_size`` ones form a group.
            group_size: divides the number of requests.
            num_groups: whole groups that suffice; None asks for all. An engine may return more.

        Returns:
            One entry per request, in order, the same on every rank; None in groups that were not whole in time.
        """
        ...

    def grow(self, seeds: Sequence[Branch], expand: Expand) -> dict[Key, Completion]:
        """Complete branches, and all that follows from them.

        Args:
            seeds: where to start.
            expand: what follows from a completion; asked on any rank, in any order.

        Returns:
            Every branch's completion, the same on every rank.
        """
        ...

    def update_weights(
        self,
        weights: WeightSource,
        version: int,
        *,
        shards: ShardSource | None = None,
        checkpoint: CheckpointSource | None = None,
    ) -> None:
        """Replace all weights.

        Args:
            weights: the engine may call it again, before the next update, for a server that had to be restarted.
            version: the publish counter that completions will carry from now on.
            shards: sends them without ever making them whole, to engines that can take them so.
            checkpoint: writes them where servers can load them; servers then get them that way.
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

    def metrics(self) -> dict[str, float]:
        """What went wrong and was mended since the last call, as ``rollout/<what>``: retries, restarts."""
        ...

    def close(self) -> None:
        """Stop what the engine has started. Safe to call twice."""
        ...
