"""The rollout engine protocol: token ids in, token ids and log-probs out, under a stated version of the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.errors import UserError
from megatron_rl.rollout.growth import Branch, Expand, Key, grow_by_level
from megatron_rl.types import Completion, Request


@dataclass(frozen=True)
class ServedModel:
    """The model that an engine generates from: its config and its special tokens."""

    path: Path
    """Directory with config.json."""
    shape: ModelShape
    dtype: torch.dtype
    """Type of weights and activations."""
    stop_ids: tuple[int, ...]
    """Token ids that end a response (they are part of it)."""
    pad_id: int = 0
    """Id that fills batches; never part of a response."""
    longest_request: int = 0
    """Most tokens of a prompt with its response; 0 if unknown."""
    records_experts: bool = False
    """True if completions carry the chosen experts."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that servers must read differently, such as ``quantization_config``."""

    @property
    def experts(self) -> tuple[int, int] | None:
        """(layers, experts per token) if completions carry the chosen experts, else None."""
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
    """True if its ranks run our weight loader, which ``ServerPort.post`` needs."""


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


@runtime_checkable
class RolloutEngine(Protocol):
    """The source of completions. Every method is a collective: all ranks call it in the same order with equal arguments."""

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
        """Complete branches and all their descendants.

        Args:
            seeds: the first branches.
            expand: gives the children of a completed branch; any rank may call it, in any order.

        Returns:
            The completion of every branch, the same on every rank.
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
        """Release memory that only generation needs (KV caches), until ``resume_memory``."""
        ...

    def resume_memory(self) -> None:
        """Take back the memory of ``release_memory``.

        Called before each ``update_weights``, also the first, when this rank's trainer has released what only updates need.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return counts of mended failures since the last call, as ``rollout/<name>``: retries, restarts."""
        ...

    def close(self) -> None:
        """Stop what the engine has started. Safe to call twice."""
        ...


class InProcessEngine(ABC):
    """An engine in the trainer's own processes: a ``RolloutEngine`` as soon as it completes requests and takes weights."""

    weight_version: int = -1
    """Publish counter of the weights; ``update_weights`` sets it."""

    @abstractmethod
    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete all requests, in order; a collective, with the same result on every rank."""

    @abstractmethod
    def update_weights(self, source: WeightSource, version: int) -> None:
        """Load ``source.tensors()`` and set ``weight_version``; a collective."""

    def generate(
        self, requests: Sequence[Request], *, group_size: int = 1, num_groups: int | None = None
    ) -> list[Completion | None]:
        """Complete all requests, more than ``num_groups`` asks for."""
        return [*self.complete(requests)]

    def grow(self, seeds: Sequence[Branch], expand: Expand) -> dict[Key, Completion]:
        """Complete branches and all their descendants, level by level."""
        return grow_by_level(seeds, expand, self.complete)

    def release_memory(self) -> None:
        """Keep everything: memory that generation needs lives only inside ``complete``."""

    def resume_memory(self) -> None:
        """Take nothing back: nothing was released."""

    def metrics(self) -> dict[str, float]:
        """Return nothing: nothing is mended here."""
        return {}

    def close(self) -> None:
        """Stop nothing: nothing was started."""
