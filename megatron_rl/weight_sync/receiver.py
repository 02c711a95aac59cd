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
import itertools
import json
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.digest import digest_on_device, digests_of
from megatron_rl.process.signed_store import SignedStore, open_store
from megatron_rl.weight_sync.buckets import Bucket, Placed, box, buckets_of, scatter
from megatron_rl.weight_sync.network import JOIN_S, make_group, receive, wait_for
from megatron_rl.weight_sync.pieces import Piece, ServedForm
from megatron_rl.weight_sync.plan import WeightStream
from megatron_rl.weight_sync.served import RolloutLayout, served_parameters
from megatron_rl.weight_sync.shared import NUM_BUFFERS, BucketReader, BufferPool
from megatron_rl.weight_sync.spec import Transfer, TransferSpec, streams_to
from megatron_rl.weight_sync.whole_bucket import unpack

LOOK_S = 0.0002


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


_pools: dict[torch.device, BufferPool] = {}
_groups: dict[str, tuple[Any, SignedStore]] = {}
"""Group of the last transfer, and the store that it was made with; at most one."""


def _receive(model: torch.nn.Module, spec: TransferSpec, store: SignedStore, tp_rank: int) -> dict[str, Any]:
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    is_whole = spec.transfer.cargo == "whole"
    unfit = None if is_whole else unfitness(parameters, spec.transfer, tp_rank)
    store.set(spec.key("ready", tp_rank), json.dumps({"groups": list(_groups), "unfit": unfit}))
    verdict = json.loads(store.get(spec.key("verdict")))
    if not verdict["servers"]:
        return {"error": "told to give up"}
    started = time.monotonic()
    # Every rank of the server joins its group, also one that reads from memory alone.
    group = _group(verdict["group"], spec, store, tp_rank) if spec.senders() else None
    if is_whole:
        device = next(iter(parameters.values())).device
        model.load_weights(_whole_tensors(spec, store, verdict["servers"], group, tp_rank, device))  # type: ignore[operator]
        return {"receive_s": time.monotonic() - started}
    me, tp_size = spec.receivers[tp_rank], spec.transfer.rollout.tp_size
    streams = [s for s in streams_to(spec.transfer.plan(), verdict["servers"], tp_size) if me in s.receivers]
    device = next(iter(parameters.values())).device
    pool = _pools.setdefault(device, BufferPool(device))
    inlets = [
        _Inlet(stream, spec, store, me, group=None if stream.is_local else group, pool=pool, number=number)
        for number, stream in enumerate(streams)
    ]
    for number in range(max(len(inlet.buckets) for inlet in inlets)):
        for inlet in inlets:  # the same order at all receivers: nobody waits for one that waits for him
            inlet.take(number, parameters, tp_rank)
    received = time.monotonic()
    pieces = sorted((each.piece for inlet in inlets for each in inlet.mine), key=lambda piece: piece.number)
    return {
        "digests": encode(piece_digests(pieces, parameters, tp_rank)),
        "receive_s": received - started,
        "digest_s": time.monotonic() - received,
        "bytes": sum(piece.num_bytes for piece in pieces),
    }


def _whole_tensors(
    spec: TransferSpec, store: SignedStore, servers: Collection[int], group: Any, tp_rank: int, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors, each as memory of its own: loaders keep some until their counterparts come."""
    me = spec.receivers[tp_rank]
    sender = spec.transfer.whole_sender(me)
    reader: BucketReader | None = None
    run = torch.empty(0)
    if sender is None:
        run = torch.empty(spec.transfer.bucket_bytes, dtype=torch.uint8, device=device)
    else:
        handle = json.loads(store.get(spec.stream_key(sender)))
        reader = BucketReader(handle, spec.readers(sender, servers).index(me))
    for number in itertools.count():
        if reader is None:
            wait_for(group, receive(group, run, 0, number), spec.timeout_s)
        else:
            _wait(partial(reader.is_there, number), spec.timeout_s, f"trainer rank {sender}")
            run = reader.buffer(number)
        tensors = [(name, tensor.clone()) for name, tensor in unpack(run)]
        if reader is not None:
            reader.done(number)
        if not tensors:
            return
        yield from tensors


def _group(name: str, spec: TransferSpec, store: SignedStore, tp_rank: int) -> Any:
    """Return the group of this server and those that send to it over the network, made anew if that is asked for."""
    if name not in _groups:
        _groups.clear()
        senders = spec.senders()
        size, timeout_s = len(senders) + spec.transfer.rollout.tp_size, min(JOIN_S, spec.timeout_s)
        group = make_group(spec.network, store, name, len(senders) + tp_rank, size, host=spec.host, timeout_s=timeout_s)
        _groups[name] = group, store
    return _groups[name][0]


class _Inlet:
    """This rank's end of one stream."""

    def __init__(
        self,
        stream: WeightStream,
        spec: TransferSpec,
        store: SignedStore,
        me: int,
        *,
        group: Any,
        pool: BufferPool,
        number: int,
    ) -> None:
        self.buckets: list[Bucket] = list(buckets_of(stream))
        self._mine = [[each for each in bucket.placed if me in each.carried.takers] for bucket in self.buckets]
        self._spec, self._group, self._sender = spec, group, stream.sender
        if stream.is_local:
            handle = json.loads(store.get(spec.stream_key(stream.sender)))
            self._reader = BucketReader(handle, stream.receivers.index(me))
        else:
            self._rank, self._works = spec.senders().index(stream.sender), dict[int, Any]()
            self._buffers = pool.plain(number, max(bucket.num_bytes for bucket in self.buckets))

    @property
    def mine(self) -> list[Placed]:
        """Return all that this rank takes."""
        return [each for placed in self._mine for each in placed]

    def take(self, number: int, parameters: Mapping[str, Tensor], tp_rank: int) -> None:
        """Copy what this rank takes from a bucket; beyond the last there is nothing."""
        if number >= len(self.buckets):
            return
        if self._group is None:
            if self._mine[number]:
                _wait(partial(self._reader.is_there, number), self._spec.timeout_s, f"trainer rank {self._sender}")
                scatter(self._mine[number], self._reader.buffer(number), parameters, tp_rank)
            self._reader.done(number)
            return
        for ahead in range(number, min(number + NUM_BUFFERS, len(self.buckets))):
            if ahead not in self._works:
                self._works[ahead] = receive(self._group, self._run(ahead), self._rank, ahead)
        wait_for(self._group, self._works[number], self._spec.timeout_s)
        scatter(self._mine[number], self._run(number), parameters, tp_rank)

    def _run(self, number: int) -> Tensor:
        return self._buffers[number % NUM_BUFFERS][: self.buckets[number].num_bytes]


def _wait(condition: Callable[[], bool], limit_s: float, whom: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing came from {whom} within {limit_s:g} s")
        time.sleep(LOOK_S)


def piece_digests(pieces: Iterable[Piece], parameters: Mapping[str, Tensor], tp_rank: int) -> list[int]:
    """Return the digest of each piece, from the parameters of a server rank."""

    def found(piece: Piece) -> Tensor:
        target = next(target for target in piece.targets if target.tp_rank == tp_rank)
        block = parameters[target.name][box(target.start, piece.size)]
        return digest_on_device(piece.hf_name, block, piece.hf_start, piece.hf_extent)

    return digests_of(map(found, pieces))


def unfitness(parameters: dict[str, Tensor], what: Transfer, tp_rank: int) -> str | None:
    """Return why a server rank's parameters are not those that the plan fills, or None."""
    expected = _expected(what.shape, what.rollout, what.form, tp_rank)
    found = {name: (tuple(each.shape), str(each.dtype)) for name, each in parameters.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name} is {_in_words(found.get(name))}, the plan expects {_in_words(expected.get(name))}"
    return None


def _in_words(found: tuple[tuple[int, ...], str] | None) -> str:
    return "not there" if found is None else f"{list(found[0])} {found[1].removeprefix('torch.')}"


@lru_cache(maxsize=1)
def _expected(
    shape: ModelShape, layout: RolloutLayout, form: ServedForm, tp_rank: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    expected = {
        parameter.name: (parameter.shape, f"torch.{form.dtype_name(parameter.form)}")
        for parameter in served_parameters(shape, layout, tp_rank, fp8=form.fp8)
    }
    if shape.tied:  # the output layer's parameter is the embedding's, under its first name
        expected.pop("lm_head.weight", None)
    return expected


def encode(numbers: list[int]) -> str:
    """Encode numbers as text: little-endian 64-bit numbers in base64."""
    return base64.b64encode(numpy.array(numbers, dtype="<u8").tobytes()).decode()


def decode(text: str) -> list[int]:
    """Decode the text of ``encode``."""
    return numpy.frombuffer(base64.b64decode(text), dtype="<u8").tolist()
