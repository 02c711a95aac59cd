"""The server's end of a transfer: the custom weight loader inside each tensor-parallel rank of an SGLang server.

    server --custom-weight-loader megatron_rl.weight_sync.receiver.load
    POST /update_weights_from_tensor {"load_format": the same name, one tensor: a spec}

The spec is JSON: no weights and no code, only what the rank needs to compute the plan and to meet the trainer. The rank takes
part in three exchanges through the trainer's store, and any of them may tell it to give up. All that is said there is signed
with a key that the spec brings:

    ready       ->  the process group it still has, and whether its parameters are those of the table
    group       <-  the group to receive over; empty: without this server
    report      ->  the digests of its parameters after the transfer, or the error

An exception that left the loader would end the server, so none does: errors go into the report, and the trainer does not let
the server serve.
"""

from __future__ import annotations

import base64
import json
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal, Protocol, cast

import numpy
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.process.network import own_address
from megatron_rl.process.signed_store import SignedStore, open_store
from megatron_rl.weight_sync.mailbox import Mailbox
from megatron_rl.weight_sync.messages import Message, digest_overlaps, make_messages, receive_messages
from megatron_rl.weight_sync.plan import Overlap, TrainingLayout, make_plan
from megatron_rl.weight_sync.served import RolloutLayout, served_parameters


class TimedWork(Protocol):
    """A message in transit."""

    def wait(self, timeout: timedelta = ..., /) -> object:
        """Wait for the end of the transfer; raises RuntimeError if the other end is gone or too slow."""
        ...


class Channel(Protocol):
    """The part of a process group that both ends use."""

    def send(self, tensors: list[Tensor], destination: int, tag: int, /) -> TimedWork:
        """Start to send one tensor."""
        ...

    def recv(self, tensors: list[Tensor], source: int, tag: int, /) -> TimedWork:
        """Start to receive into one tensor."""
        ...


JOIN_S = 20.0
"""Limit of joining a group. All members have said that they are ready, so it takes moments unless one has died."""


@dataclass(frozen=True)
class TransferSpec:
    """Description of a transfer for a server rank: numbers and names, which travel as JSON."""

    host: str
    port: int
    """Port of the trainer's store."""
    store_key: str
    """Key of the ``SignedStore`` there, as hex digits; drawn for this trainer."""
    attempt: str
    """Prefix of this transfer's keys."""
    server: int
    shape: ModelShape
    training: TrainingLayout
    rollout: RolloutLayout
    bucket_elements: int
    dtype_name: Literal["float32", "bfloat16", "float16"]
    """Dtype of the weights, a name in torch."""
    backend: Literal["gloo", "nccl", "ipc"]
    timeout_s: float

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return cast(torch.dtype, getattr(torch, self.dtype_name))

    def key(self, what: str, tp_rank: int | None = None) -> str:
        """Return a key of this transfer in the store."""
        return f"{self.attempt}/{self.server}/{what}" + ("" if tp_rank is None else f"/{tp_rank}")

    def to_json(self) -> bytes:
        """Return the text for a server rank."""
        return _spec_type().dump_json(self)

    @staticmethod
    def from_json(text: bytes) -> TransferSpec:
        """Read the text of ``to_json``.

        Raises:
            ValueError: it is something else.
        """
        return _spec_type().validate_json(text, strict=False)


@lru_cache(maxsize=1)
def _spec_type() -> TypeAdapter[TransferSpec]:
    return TypeAdapter(TransferSpec)


def make_group(
    backend: str, store: dist.Store, name: str, rank: int, size: int, *, host: str, timeout_s: float
) -> Channel:
    """Make a process group apart from the default one, or a ``Mailbox`` in its place; every member calls this.

    Args:
        backend: ``gloo``, ``nccl`` or ``ipc``.
        store: shared by all members.
        name: of the group.
        rank: of this member.
        size: number of members.
        host: address of the store; gloo listens on the address that reaches it.
        timeout_s: limit of joining.
    """
    own = dist.PrefixStore(name, store)
    if backend == "ipc":
        return Mailbox(own, rank, timeout_s)
    if backend == "gloo":
        gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(1, host))]
        gloo._timeout = timedelta(seconds=timeout_s)
        return cast(Channel, dist.ProcessGroupGloo(own, rank, size, gloo))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return cast(Channel, dist.ProcessGroupNCCL(own, rank, size, options))


def load(model: torch.nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load weights: SGLang calls this in every rank with one tensor, the bytes of a ``TransferSpec``. Never raises."""
    try:
        from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

        (_, payload) = next(iter(named_tensors))
        take(model, bytes(payload.cpu().tolist()), int(get_tensor_model_parallel_rank()))
    except Exception:
        traceback.print_exc()


def take(model: torch.nn.Module, payload: bytes, tp_rank: int) -> None:
    """Fill a rank's parameters from the trainer. Never raises.

    Args:
        model: its parameters have SGLang's names and this rank's shapes.
        payload: a ``TransferSpec`` as JSON.
        tp_rank: of the rank in its server.
    """
    try:
        spec = TransferSpec.from_json(payload)
        key, timeout = bytes.fromhex(spec.store_key), timedelta(seconds=spec.timeout_s)
        store, _ = open_store(spec.host, key, port=spec.port, timeout=timeout)
        report = _receive(model, spec, store, tp_rank)
    except Exception as error:
        traceback.print_exc()
        _groups.clear()
        report = {"error": f"{type(error).__name__}: {error}"[:2000]}
    try:
        store.set(spec.key("report", tp_rank), json.dumps(report))
    except Exception:  # the trainer notices that no report came
        traceback.print_exc()


_groups: dict[str, tuple[Channel, SignedStore]] = {}
"""Group of the last transfer, and the store that it was made with; at most one."""


def _receive(model: torch.nn.Module, spec: TransferSpec, store: SignedStore, tp_rank: int) -> dict[str, Any]:
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    ready = {"groups": list(_groups), "unfit": unfitness(parameters, spec.shape, spec.rollout, tp_rank)}
    store.set(spec.key("ready", tp_rank), json.dumps(ready))
    name = store.get(spec.key("group")).decode()
    if not name:
        return {"error": "told to give up"}
    rank = spec.training.num_ranks + tp_rank
    if name not in _groups:
        _groups.clear()
        size = spec.training.num_ranks + spec.rollout.tp_size
        _groups[name] = (
            make_group(spec.backend, store, name, rank, size, host=spec.host, timeout_s=min(JOIN_S, spec.timeout_s)),
            store,
        )
    group, _ = _groups[name]
    messages, overlaps = _mine(spec, tp_rank)
    started = time.monotonic()
    limit = timedelta(seconds=spec.timeout_s)

    def receive(flat: Tensor, message: Message) -> _Receipt:
        return _Receipt(group.recv([flat], message.sender, message.tag), limit)

    receive_messages(messages, parameters, dtype=spec.dtype, receive=receive)
    received = time.monotonic()
    digests = digest_overlaps(overlaps, parameters, hf_tensors(spec.shape), dtype=spec.dtype, is_sender=False)
    return {
        "digests": encode(digests),
        "receive_s": received - started,
        "digest_s": time.monotonic() - received,
        "bytes": sum(message.num_elements for message in messages) * spec.dtype.itemsize,
    }


@dataclass(frozen=True)
class _Receipt:
    """A message to this rank. The group's own limit is that for joining; a transfer may take longer."""

    work: TimedWork
    limit: timedelta

    def wait(self) -> None:
        """Wait for the message; raises RuntimeError if the sender is gone or too slow."""
        self.work.wait(self.limit)


def unfitness(parameters: dict[str, Tensor], shape: ModelShape, layout: RolloutLayout, tp_rank: int) -> str | None:
    """Return why a server rank's parameters are not those that the plan fills, or None."""
    expected = {parameter.name: parameter.shape for parameter in served_parameters(shape, layout, tp_rank)}
    if shape.tied:  # the output layer's parameter is the embedding's, under its first name
        expected.pop("lm_head.weight", None)
    found = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name} has shape {found.get(name)}, the plan expects {expected.get(name)}"
    return None


def encode(digests: list[int]) -> str:
    """Encode digests as text: little-endian 64-bit numbers in base64."""
    return base64.b64encode(numpy.array(digests, dtype="<u8").tobytes()).decode()


def decode(text: str) -> list[int]:
    """Decode the text of ``encode``."""
    return numpy.frombuffer(base64.b64decode(text), dtype="<u8").tolist()


def _mine(spec: TransferSpec, tp_rank: int) -> tuple[list[Message], list[Overlap]]:
    me = spec.server * spec.rollout.tp_size + tp_rank
    return _of_receiver(spec.shape, spec.training, spec.rollout, spec.bucket_elements, me)


@lru_cache(maxsize=1)
def _of_receiver(
    shape: ModelShape, training: TrainingLayout, rollout: RolloutLayout, bucket_elements: int, me: int
) -> tuple[list[Message], list[Overlap]]:
    plan = make_plan(shape, training, rollout)
    messages = [m for m in make_messages(plan, bucket_elements=bucket_elements) if m.receiver == me]
    return messages, [overlap for overlap in plan.overlaps if overlap.tp_rank == me % rollout.tp_size]
