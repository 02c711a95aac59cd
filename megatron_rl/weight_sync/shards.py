"""The trainer's end of shard-to-shard updates: every rank sends what servers lack, and rank 0 compares digests.

    rank 0      spec -> server ranks -> "ready" ... group ... send ... digests of both ends are compared
    all ranks                                  join    send    own digests, summed over ranks

Each server has a process group of all trainer ranks and its own, so that a fault of one server concerns no other. A group lives
until its server dies. Rank 0 holds the store in which both ends meet.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.digest import as_text
from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.parallel.agree import broadcast_json, gather_json
from megatron_rl.process import activity
from megatron_rl.process.signed_store import SignedStore, open_store
from megatron_rl.weight_sync.mailbox import BROKEN
from megatron_rl.weight_sync.messages import Message, digest_overlaps, make_messages, send_messages
from megatron_rl.weight_sync.plan import Copy, Overlap, TrainingLayout, make_plan
from megatron_rl.weight_sync.receiver import JOIN_S, Channel, TimedWork, TransferSpec, decode, make_group
from megatron_rl.weight_sync.served import RolloutLayout

LOOK_S = 0.01
"""Seconds between two looks of rank 0 for answers."""


@dataclass(frozen=True)
class Rendezvous:
    """Address and means by which both ends meet."""

    host: str
    """Address of rank 0 that servers reach."""
    backend: Literal["gloo", "nccl", "ipc"]
    """``ipc`` is for servers on this machine's GPUs."""
    timeout_s: float
    bucket_bytes: int


@dataclass(frozen=True)
class Delivery:
    """The outcome of one server's update."""

    state: Literal["proven", "mismatch", "failed", "unfit"]
    """``proven``: both ends have the same digests. ``unfit``: the server's parameters are not cut as the plan says, and
    nothing was sent."""
    detail: str
    """Reason in words; empty if proven."""


class ShardSender:
    """Sender of shards of the current weights to servers. Every method is a collective."""

    def __init__(
        self,
        parameters: Callable[[], Mapping[str, Tensor]],
        shape: ModelShape,
        training: TrainingLayout,
        rendezvous: Rendezvous,
        *,
        dtype: torch.dtype,
        cpu_group: dist.ProcessGroup,
    ) -> None:
        """Open the store on rank 0; servers are met only in ``send``.

        Args:
            parameters: gives this rank's, by global Megatron name, as they are now.
            shape: of the model.
            training: of the trainer.
            rendezvous: of both ends.
            dtype: of the servers' parameters.
            cpu_group: all trainer ranks, over gloo.
        """
        self._parameters, self._shape, self._training = parameters, shape, training
        self._rendezvous, self._dtype, self._cpu_group = rendezvous, dtype, cpu_group
        self._rank = dist.get_rank(cpu_group)
        assert training.num_ranks == dist.get_world_size(cpu_group), (
            f"{training} on {dist.get_world_size(cpu_group)} ranks"
        )
        self._bucket_elements = rendezvous.bucket_bytes // dtype.itemsize
        self._extents = hf_tensors(shape)
        self._store_key = str(broadcast_json(secrets.token_hex(32), cpu_group))
        self._store, self._port = self._open_store()
        self._groups: dict[int, tuple[str, Channel]] = {}
        self._num_attempts = 0
        self._name = uuid.uuid4().hex
        """Rank 0's sets this trainer's groups apart from those that a server remembers of an earlier trainer."""
        self._rollout = RolloutLayout(num_servers=0)
        self.metrics: dict[str, float] = {}
        """Figures of the last ``send``: bytes, seconds, servers proven."""

    def send(
        self,
        servers: Sequence[int],
        layout: RolloutLayout,
        *,
        post: Callable[[int, bytes], Future[str | None]] | None,
    ) -> dict[int, Delivery]:
        """Send the current weights to servers, and compare digests of both ends.

        Args:
            servers: numbers within the layout, the same on every rank.
            layout: of all servers of the engine.
            post: on rank 0, hands a payload to a server (``ServerPort.post``); None on other ranks.

        Returns:
            The outcome by server, the same on every rank. The caller puts only proven servers into service.
        """
        try:
            self._prepare(layout)
        except UserError as error:  # the same on every rank
            return {server: Delivery("unfit", str(error)) for server in servers}
        self._num_attempts += 1
        self.metrics.clear()
        specs = {server: self._spec(server) for server in servers}
        futures = {server: post(server, spec.to_json()) for server, spec in specs.items()} if post else {}
        deliveries = self._join(specs, futures)
        connections = [_Connection(server, *self._groups[server]) for server in servers if server not in deliveries]
        for connection in connections:
            if connection.server in futures:
                futures[connection.server].add_done_callback(partial(self._tell_if_gone, connection.name))
        parameters = self._parameters()
        with self._clock("send"):
            self._transfer(connections, parameters)
        with self._clock("digest"):
            expected = self._digests(parameters)
        deliveries |= self._conclude(connections, specs, futures, expected)
        for server, delivery in deliveries.items():
            if delivery.state != "proven":
                self._groups.pop(server, None)
        self.metrics["weight_sync/servers_proven"] = float(len([d for d in deliveries.values() if d.state == "proven"]))
        return deliveries

    def _prepare(self, rollout: RolloutLayout) -> None:
        """Compute the plan and this rank's messages, once for each layout of the servers."""
        if rollout == self._rollout:
            return
        plan = make_plan(self._shape, self._training, rollout)
        messages = make_messages(plan, bucket_elements=self._bucket_elements)
        self._messages = [message for message in messages if message.sender == self._rank]
        self._overlaps, self._digester = plan.overlaps, _first_senders(plan.copies, rollout.tp_size)
        self._digested = [overlap for overlap in plan.overlaps if self._digester[overlap.index] == self._rank]
        self._rollout = rollout
        self._groups.clear()

    # ------------------------------------------------------------------------------------------------ the steps of send

    def _join(
        self, specs: Mapping[int, TransferSpec], futures: Mapping[int, Future[str | None]]
    ) -> dict[int, Delivery]:
        """Meet the servers' ranks, and make a group for each server that is not in the returned failures."""
        verdicts: dict[int, list[str]] = {}

        def look() -> bool:
            for server in specs.keys() - verdicts.keys():
                if (verdict := self._readiness(specs[server], futures[server])) is not None:
                    verdicts[server] = verdict
                    self._store.set(specs[server].key("group"), verdict[1] if verdict[0] == "group" else "")
            return len(verdicts) == len(specs)

        self._together(look)
        lost: dict[int, Delivery] = {}
        failures = {}
        for text, (state, detail) in broadcast_json(verdicts, self._cpu_group).items():
            server = int(text)
            if state != "group":
                lost[server] = Delivery(state, detail)
            elif self._groups.get(server, ("",))[0] != detail:
                try:
                    self._groups[server] = (detail, self._make_group(detail))
                except RuntimeError as error:
                    failures[server] = f"rank {self._rank} could not join: {_short(error)}"
        return lost | self._agree(failures)

    def _readiness(self, spec: TransferSpec, future: Future[str | None]) -> list[str] | None:
        """Return ["group", name] or [state, detail of the failure] on rank 0; None while it is not known."""
        keys = [spec.key("ready", tp_rank) for tp_rank in range(self._rollout.tp_size)]
        if not self._store.check(keys):
            return ["failed", _problem(future) or "its ranks never became ready"] if future.done() else None
        try:
            answers = [json.loads(self._store.get(key)) for key in keys]
        except RuntimeError as error:  # a stranger's words
            return ["failed", _short(error)]
        for tp_rank, ready in enumerate(answers):
            if ready["unfit"]:
                return ["unfit", f"rank {tp_rank}: {ready['unfit']}"]
        name = self._groups.get(spec.server, ("",))[0]
        is_kept = name and all(name in ready["groups"] for ready in answers)
        return ["group", name if is_kept else spec.key("group/joined")]

    def _make_group(self, name: str) -> Channel:
        size = self._training.num_ranks + self._rollout.tp_size
        host, timeout_s = self._rendezvous.host, min(JOIN_S, self._rendezvous.timeout_s)
        return make_group(self._rendezvous.backend, self._store, name, self._rank, size, host=host, timeout_s=timeout_s)

    def _transfer(self, connections: Sequence[_Connection], parameters: Mapping[str, Tensor]) -> None:
        """Send all messages; a failure is noted on its connection."""
        by_server = {connection.server: connection for connection in connections}
        tp_size, limit = self._rollout.tp_size, timedelta(seconds=self._rendezvous.timeout_s)
        messages = [message for message in self._messages if message.receiver // tp_size in by_server]

        def send(flat: Tensor, message: Message) -> _Sent | None:
            server, tp_rank = divmod(message.receiver, tp_size)
            return by_server[server].send(flat, self._training.num_ranks + tp_rank, message.tag, limit)

        for _ in send_messages(messages, parameters, dtype=self._dtype, send=send):
            activity.beat()
        num_bytes = sum(message.num_elements for message in messages) * self._dtype.itemsize
        self.metrics["weight_sync/sent_bytes"] = float(sum(gather_json(num_bytes, self._cpu_group)))

    def _tell_if_gone(self, group: str, future: Future[str | None]) -> None:
        """Tell a mailbox that its server is gone; a process group notices by itself."""
        if (problem := _problem(future)) is not None:
            dist.PrefixStore(group, self._store).set(BROKEN, problem)

    def _digests(self, parameters: Mapping[str, Tensor]) -> list[int]:
        """Return the digest of every overlap; one of its holders computes each."""
        digests = digest_overlaps(self._digested, parameters, self._extents, dtype=self._dtype, is_sender=True)
        table = torch.zeros(len(self._overlaps), dtype=torch.int64)
        table[[overlap.index for overlap in self._digested]] = torch.from_numpy(
            numpy.array(digests, dtype=numpy.uint64).view(numpy.int64)
        )
        dist.all_reduce(table, group=self._cpu_group)
        return table.numpy().view(numpy.uint64).tolist()

    def _conclude(
        self,
        connections: Sequence[_Connection],
        specs: Mapping[int, TransferSpec],
        futures: Mapping[int, Future[str | None]],
        expected: Sequence[int],
    ) -> dict[int, Delivery]:
        """Return the outcome of the servers that were sent to."""
        failures = {
            connection.server: f"rank {self._rank} could not send: {connection.error}"
            for connection in connections
            if connection.error
        }
        deliveries = self._agree(failures)
        self._together(lambda: all(futures[connection.server].done() for connection in connections))
        if self._rank == 0:
            for connection in connections:
                if connection.server not in deliveries:
                    deliveries[connection.server] = self._verify(
                        specs[connection.server], futures[connection.server], expected
                    )
            for spec in specs.values():
                self._forget(spec)
        outcomes = broadcast_json({s: [d.state, d.detail] for s, d in deliveries.items()}, self._cpu_group)
        return {int(server): Delivery(*parts) for server, parts in outcomes.items()}

    def _verify(self, spec: TransferSpec, future: Future[str | None], expected: Sequence[int]) -> Delivery:
        """Compare on rank 0 the digests of a server's ranks with the trainer's."""
        if (problem := _problem(future)) is not None:
            return Delivery("failed", problem)
        for tp_rank in range(self._rollout.tp_size):
            key = spec.key("report", tp_rank)
            if not self._store.check([key]):
                return Delivery("failed", f"its rank {tp_rank} reported nothing")
            try:
                report = json.loads(self._store.get(key))
            except RuntimeError as error:  # a stranger's words
                return Delivery("failed", _short(error))
            if "error" in report:
                return Delivery("failed", f"its rank {tp_rank} reported {report['error']}")
            mine = [overlap for overlap in self._overlaps if overlap.tp_rank == tp_rank]
            for overlap, found in zip(mine, decode(report["digests"]), strict=True):
                if found != expected[overlap.index]:
                    return Delivery("mismatch", self._describe(overlap, expected[overlap.index], found))
            for name in ("receive_s", "digest_s"):
                key = f"weight_sync/{name}"
                self.metrics[key] = max(self.metrics.get(key, 0.0), report[name])
        return Delivery("proven", "")

    def _forget(self, spec: TransferSpec) -> None:
        """Remove the keys of a transfer, because a run makes thousands of them."""
        self._store.delete_key(spec.key("group"))
        for what in ("ready", "report"):
            for tp_rank in range(self._rollout.tp_size):
                self._store.delete_key(spec.key(what, tp_rank))

    def _describe(self, overlap: Overlap, expected: int, found: int) -> str:
        end = [a + n for a, n in zip(overlap.hf_start, overlap.size)]
        where = ", ".join(f"{a}:{b}" for a, b in zip(overlap.hf_start, end))
        return (
            f"{overlap.hf_name}[{where}] has digest {as_text(found)} on rank {overlap.tp_rank} of the server "
            f"({overlap.target}) and {as_text(expected)} on trainer rank {self._digester[overlap.index]} ({overlap.source})"
        )

    # ------------------------------------------------------------------------------------------------ helpers

    def _agree(self, failures: Mapping[int, str]) -> dict[int, Delivery]:
        """Return the failures of any rank, on every rank."""
        found: dict[int, Delivery] = {}
        for of_rank in gather_json(failures, self._cpu_group):
            for server, detail in of_rank.items():
                found.setdefault(int(server), Delivery("failed", detail))
        return found

    def _together(self, is_done: Callable[[], bool]) -> None:
        """Wait on all ranks until a condition holds on rank 0, with a watchdog beat every second."""
        while True:
            deadline, done = time.monotonic() + 1.0, False
            while self._rank == 0 and not (done := is_done()) and time.monotonic() < deadline:
                time.sleep(LOOK_S)
            activity.beat()
            if broadcast_json(done, self._cpu_group):
                return

    @contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.metrics[f"weight_sync/{what}_s"] = time.monotonic() - started

    def _spec(self, server: int) -> TransferSpec:
        return TransferSpec(
            host=self._rendezvous.host,
            port=self._port,
            store_key=self._store_key,
            attempt=f"transfer/{self._name}/{self._num_attempts}",
            server=server,
            shape=self._shape,
            training=self._training,
            rollout=self._rollout,
            bucket_elements=self._bucket_elements,
            dtype_name=str(self._dtype).removeprefix("torch."),  # type: ignore[arg-type]
            backend=self._rendezvous.backend,
            timeout_s=self._rendezvous.timeout_s,
        )

    def _open_store(self) -> tuple[SignedStore, int]:
        """Return the store of this trainer, which listens on rank 0, and its port."""
        host, key = self._rendezvous.host, bytes.fromhex(self._store_key)
        timeout = timedelta(seconds=self._rendezvous.timeout_s)
        own = open_store(host, key, port=None, timeout=timeout) if self._rank == 0 else None
        port = int(broadcast_json(own and own[1], self._cpu_group))
        opened = own or open_store(host, key, port=port, timeout=timeout)
        dist.barrier(self._cpu_group)  # no rank leaves before all are connected
        return opened


class _Connection:
    """The connection to one server. After the first failure nothing more is sent over it."""

    def __init__(self, server: int, name: str, group: Channel) -> None:
        self.server, self.name, self._group = server, name, group
        self.error = ""

    def send(self, flat: Tensor, rank: int, tag: int, limit: timedelta) -> _Sent | None:
        """Start to send a message; returns None once the connection has failed."""
        if self.error:
            return None
        try:
            return _Sent(self._group.send([flat], rank, tag), self, limit)
        except RuntimeError as error:
            self.error = _short(error)
            return None


@dataclass
class _Sent:
    """A message in transit over a connection."""

    work: TimedWork
    connection: _Connection
    limit: timedelta

    def wait(self) -> None:
        """Wait until the message has arrived, or its connection has failed."""
        if self.connection.error:
            return
        try:
            self.work.wait(self.limit)
        except RuntimeError as error:
            self.connection.error = _short(error)


def _first_senders(copies: Sequence[Copy], tp_size: int) -> dict[int, int]:
    """Return the rank that sends each overlap to the first server."""
    return {copy.overlap.index: copy.sender for copy in copies if copy.receiver < tp_size}


def _problem(future: Future[str | None]) -> str | None:
    """Return what went wrong in a finished request, or None."""
    try:
        return future.result()
    except Exception as error:  # on rank 0 alone: raising here would leave the others waiting
        return _short(error) or type(error).__name__


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
