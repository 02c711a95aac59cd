"""What every rollout engine does: token ids in, token ids and log-probs out, under a stated version of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.errors import UserError
from megatron_rl.rollout.growth import Branch, Expand, Key
from megatron_rl.types import Completion, Request


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
class ServerInfo:
    """One server, as weight delivery sees it."""

    number: int
    is_up: bool
    """False while the server does not answer: nothing is sent to it."""
    tp_size: int
    ep_size: int
    """Groups among the ``tp_size`` ranks that divide the experts between them."""
    takes_payloads: bool
    """Its ranks run our weight loader, which ``ServerPort.post`` needs."""


class ServerPort(Protocol):
    """One update of an engine's servers, open to whatever transport brings the weights.

    Methods are collectives that raise the same ``UserError`` on all ranks, except those that only rank 0 calls. Servers that
    go down during the update are skipped; the engine asks for another update when they are back.
    """

    @property
    def targets(self) -> Sequence[int]:
        """Numbers of the servers that need the current weights, the same on every rank."""
        ...

    def servers(self) -> list[ServerInfo]:
        """Return all servers of the engine, by number."""
        ...

    def begin_update(self) -> None:
        """Pause the targets and stamp their weights as neither old nor new."""
        ...

    def post(self, server: int, payload: bytes) -> Future[str | None]:
        """Hand a payload to our weight loader in all ranks of a server; only rank 0 calls this.

        Returns:
            None once all ranks are done with it, or what the server said instead.
        """
        ...

    def send_bucket(self, servers: Sequence[int], bucket: Sequence[tuple[str, Tensor]]) -> UserError | None:
        """Load whole tensors on servers; only rank 0 calls this. A refusal is returned, because other ranks cannot raise it."""
        ...

    def load_checkpoint(self, servers: Sequence[int], path: str) -> None:
        """Let servers load a Hugging Face checkpoint that they find under this path."""
        ...

    def count(self, name: str) -> None:
        """Count a failure as ``rollout/<name>`` of the engine's metrics; only rank 0 calls this."""
        ...

    def end_update(self) -> None:
        """Stamp the targets with the current version and put them into service."""
        ...


class WeightSource(Protocol):
    """The current weights. An engine in the trainer's process reads ``tensors``; one with servers calls ``deliver``.

    Both are collectives, valid until the next optimizer update, and may be called again for the same version.
    """

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Yield all weights as full tensors under their Hugging Face names; every rank consumes them to the end."""
        ...

    def deliver(self, port: ServerPort, version: int) -> None:
        """Bring the weights to ``port.targets`` and put those into service.

        Raises:
            UserError: on all ranks; a server refused the weights, or has others than were sent.
        """
        ...


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

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Replace all weights.

        Args:
            source: kept until the next update, because a server that had to be restarted needs the weights again.
            version: the publish counter that completions will carry from now on.
        """
        ...

    def release_memory(self) -> None:
        """Give up what generation alone needs (caches), until ``resume_memory``."""
        ...

    def resume_memory(self) -> None:
        """Undo ``release_memory``."""
        ...

    def metrics(self) -> dict[str, float]:
        """What went wrong and was mended since the last call, as ``rollout/<what>``: retries, restarts."""
        ...

    def close(self) -> None:
        """Stop what the engine has started. Safe to call twice."""
        ...
