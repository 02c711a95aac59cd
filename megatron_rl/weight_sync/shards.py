"""The trainer's end of shard-to-shard updates: every rank sends what servers lack, and rank 0 has the proof before they serve.

    rank 0      recipe -> server ranks -> "ready" ... group ... send ... digests of both ends are compared
    all ranks                                  join    send    own digests, summed over ranks

One process group a server, of all trainer ranks and the server's: what happens to one server concerns no other. A group
lives until its server dies. Rank 0 holds the store in which both ends meet.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

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
from megatron_rl.rollout.engine import Delivery
from megatron_rl.weight_sync.mailbox import BROKEN
from megatron_rl.weight_sync.messages import Message, digest_pieces, make_messages, send_messages
from megatron_rl.weight_sync.plan import Copy, Piece, TrainingLayout, make_plan
from megatron_rl.weight_sync.receiver import JOIN_S, Channel, Recipe, TimedWork, decode, make_group
from megatron_rl.weight_sync.served import RolloutLayout

LOOK_S = 0.01
"""How often rank 0 looks whether somebody has answered."""


@dataclass(frozen=True)
class Meeting:
    """Where and how both ends meet."""

    host: str
    """Address of rank 0 that servers reach."""
    backend: str
    """``gloo``, ``nccl``, or ``ipc`` for servers on this machine's GPUs."""
    timeout_s: float
    bucket_bytes: int


class ShardSender:
    """Sends shards of the current weights to servers. Every method is a collective. A ``rollout.engine.ShardSource``."""

    def __init__(
        self,
        parameters: Callable[[], Mapping[str, Tensor]],
        shape: ModelShape,
        training: TrainingLayout,
        meeting: Meeting,
        *,
        dtype: torch.dtype,
        cpu_group: dist.ProcessGroup,
    ) -> None:
        """Opens the store on rank 0; servers are met in ``send`` only.

        Args:
            parameters: gives this rank's, by global Megatron name, as they are now.
            shape: of the model.
            training: of the trainer.
            meeting: where and how.
            dtype: of the servers' parameters.
            cpu_group: all trainer ranks, over gloo.
        """
        self._parameters, self._shape, self._training = parameters, shape, training
        self._meeting, self._dtype, self._cpu_group = meeting, dtype, cpu_group
        self._rank = dist.get_rank(cpu_group)
        assert training.num_ranks == dist.get_world_size(cpu_group), (
            f"{training} on {dist.get_world_size(cpu_group)} ranks"
        )
        self._bucket_elements = meeting.bucket_bytes // dtype.itemsize
        self._extents = hf_tensors(shape)
        self._backend = meeting.backend
        self._store = self._open_store()
        self._groups: dict[int, tuple[str, Channel]] = {}
        self._num_attempts = 0
        self._rollout = RolloutLayout(num_servers=0)
        self.metrics: dict[str, float] = {}
        """Of the last ``send``: bytes, seconds, servers proven."""

    def send(
        self,
        servers: Sequence[int],
        *,
        num_servers: int,
        tp_size: int,
        ep_size: int,
        post: Callable[[int, bytes], Future[str | None]] | None,
    ) -> dict[int, Delivery]:
        """Send the current weights to servers, and compare what they then hold with what was sent.

        Args:
            servers: numbers below ``num_servers``, the same on every rank.
            num_servers: all there are.
            tp_size: ranks of each.
            ep_size: of these, groups that share the experts out.
            post: on rank 0, hands a recipe to a server; resolves to None once all its ranks have come back, or to what the
                server said instead. None on other ranks.

        Returns:
            How it went, by server, the same on every rank. The caller lets those serve that have it ``proven``.
        """
        try:
            self._prepare(RolloutLayout(num_servers, tp_size, ep_size))
        except UserError as error:  # the same on every rank
            return {server: Delivery("unfit", str(error)) for server in servers}
        self._num_attempts += 1
        self.metrics.clear()
        recipes = {server: self._recipe(server) for server in servers}
        futures = {server: post(server, pickle.dumps(recipe)) for server, recipe in recipes.items()} if post else {}
        deliveries = self._join(recipes, futures)
        links = [_Link(server, *self._groups[server]) for server in servers if server not in deliveries]
        for link in links:
            if link.server in futures:
                futures[link.server].add_done_callback(partial(self._tell_if_gone, link.name))
        parameters = self._parameters()
        with self._clock("send"):
            self._transfer(links, parameters)
        with self._clock("digest"):
            expected = self._digests(parameters)
        deliveries |= self._conclude(links, recipes, futures, expected)
        for server, delivery in deliveries.items():
            if delivery.state != "proven":
                self._groups.pop(server, None)
        self.metrics["weight_sync/servers_proven"] = float(len([d for d in deliveries.values() if d.state == "proven"]))
        return deliveries

    def _prepare(self, rollout: RolloutLayout) -> None:
        """Work out what goes where, once for each layout of the servers."""
        if rollout == self._rollout:
            return
        plan = make_plan(self._shape, self._training, rollout)
        messages = make_messages(plan, bucket_elements=self._bucket_elements)
        self._messages = [message for message in messages if message.sender == self._rank]
        self._pieces, self._digester = plan.pieces, _first_senders(plan.copies, rollout.tp_size)
        self._digested = [piece for piece in plan.pieces if self._digester[piece.index] == self._rank]
        self._rollout = rollout
        self._groups.clear()

    # ------------------------------------------------------------------------------------------------ the steps of send

    def _join(self, recipes: Mapping[int, Recipe], futures: Mapping[int, Future[str | None]]) -> dict[int, Delivery]:
        """Meet the servers' ranks; afterwards there is a group for each server that is not in the result."""
        verdicts: dict[int, list[str]] = {}

        def look() -> bool:
            for server in recipes.keys() - verdicts.keys():
                if (verdict := self._readiness(recipes[server], futures[server])) is not None:
                    verdicts[server] = verdict
                    self._store.set(recipes[server].key("group"), verdict[1] if verdict[0] == "group" else "")
            return len(verdicts) == len(recipes)

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

    def _readiness(self, recipe: Recipe, future: Future[str | None]) -> list[str] | None:
        """On rank 0: ["group", name] or [what is wrong, details]; None while it is not known."""
        keys = [recipe.key("ready", tp_rank) for tp_rank in range(self._rollout.tp_size)]
        if not self._store.check(keys):
            return ["failed", _problem(future) or "its ranks never became ready"] if future.done() else None
        told = [json.loads(self._store.get(key)) for key in keys]
        for tp_rank, ready in enumerate(told):
            if ready["unfit"]:
                return ["unfit", f"rank {tp_rank}: {ready['unfit']}"]
        name = self._groups.get(recipe.server, ("",))[0]
        is_kept = name and all(name in ready["groups"] for ready in told)
        return ["group", name if is_kept else recipe.key("group/joined")]

    def _make_group(self, name: str) -> Channel:
        size = self._training.num_ranks + self._rollout.tp_size
        timeout_s = min(JOIN_S, self._meeting.timeout_s)
        return make_group(self._backend, self._store, name, self._rank, size, timeout_s)

    def _transfer(self, links: Sequence[_Link], parameters: Mapping[str, Tensor]) -> None:
        """Send; what fails is noted on its link."""
        by_server = {link.server: link for link in links}
        tp_size, limit = self._rollout.tp_size, timedelta(seconds=self._meeting.timeout_s)
        messages = [message for message in self._messages if message.receiver // tp_size in by_server]

        def send(flat: Tensor, message: Message) -> _Sent | None:
            server, tp_rank = divmod(message.receiver, tp_size)
            return by_server[server].send(flat, self._training.num_ranks + tp_rank, message.tag, limit)

        for _ in send_messages(messages, parameters, dtype=self._dtype, send=send):
            activity.beat()
        num_bytes = sum(message.num_elements for message in messages) * self._dtype.itemsize
        self.metrics["weight_sync/sent_bytes"] = float(sum(gather_json(num_bytes, self._cpu_group)))

    def _tell_if_gone(self, group: str, future: Future[str | None]) -> None:
        """A process group notices by itself that a member is gone; a mailbox has to be told."""
        if (problem := _problem(future)) is not None:
            dist.PrefixStore(group, self._store).set(BROKEN, problem)

    def _digests(self, parameters: Mapping[str, Tensor]) -> list[int]:
        """Of every piece, each worked out by one of its holders."""
        digests = digest_pieces(self._digested, parameters, self._extents, dtype=self._dtype, is_sender=True)
        table = torch.zeros(len(self._pieces), dtype=torch.int64)
        table[[piece.index for piece in self._digested]] = torch.from_numpy(
            numpy.array(digests, dtype=numpy.uint64).view(numpy.int64)
        )
        dist.all_reduce(table, group=self._cpu_group)
        return table.numpy().view(numpy.uint64).tolist()

    def _conclude(
        self,
        links: Sequence[_Link],
        recipes: Mapping[int, Recipe],
        futures: Mapping[int, Future[str | None]],
        expected: Sequence[int],
    ) -> dict[int, Delivery]:
        """What became of the servers that were sent to."""
        failures = {link.server: f"rank {self._rank} could not send: {link.error}" for link in links if link.error}
        deliveries = self._agree(failures)
        self._together(lambda: all(futures[link.server].done() for link in links))
        if self._rank == 0:
            for link in links:
                if link.server not in deliveries:
                    deliveries[link.server] = self._verify(recipes[link.server], futures[link.server], expected)
            for recipe in recipes.values():
                self._forget(recipe)
        told = broadcast_json({s: [d.state, d.detail] for s, d in deliveries.items()}, self._cpu_group)
        return {int(server): Delivery(*parts) for server, parts in told.items()}

    def _verify(self, recipe: Recipe, future: Future[str | None], expected: Sequence[int]) -> Delivery:
        """On rank 0: compare what a server's ranks hold with what was to be sent."""
        if (problem := _problem(future)) is not None:
            return Delivery("failed", problem)
        for tp_rank in range(self._rollout.tp_size):
            key = recipe.key("report", tp_rank)
            if not self._store.check([key]):
                return Delivery("failed", f"its rank {tp_rank} reported nothing")
            report = json.loads(self._store.get(key))
            if "error" in report:
                return Delivery("failed", f"its rank {tp_rank} reported {report['error']}")
            mine = [piece for piece in self._pieces if piece.tp_rank == tp_rank]
            for piece, found in zip(mine, decode(report["digests"]), strict=True):
                if found != expected[piece.index]:
                    return Delivery("mismatch", self._describe(piece, expected[piece.index], found))
            for name in ("receive_s", "digest_s"):
                key = f"weight_sync/{name}"
                self.metrics[key] = max(self.metrics.get(key, 0.0), report[name])
        return Delivery("proven", "")

    def _forget(self, recipe: Recipe) -> None:
        """Remove what was exchanged: a run makes thousands of updates."""
        self._store.delete_key(recipe.key("group"))
        for what in ("ready", "report"):
            for tp_rank in range(self._rollout.tp_size):
                self._store.delete_key(recipe.key(what, tp_rank))

    def _describe(self, piece: Piece, expected: int, found: int) -> str:
        end = [a + n for a, n in zip(piece.hf_start, piece.size)]
        where = ", ".join(f"{a}:{b}" for a, b in zip(piece.hf_start, end))
        return (
            f"{piece.hf_name}[{where}] has digest {as_text(found)} on rank {piece.tp_rank} of the server "
            f"({piece.target}) and {as_text(expected)} on trainer rank {self._digester[piece.index]} ({piece.source})"
        )

    # ------------------------------------------------------------------------------------------------ helpers

    def _agree(self, failures: Mapping[int, str]) -> dict[int, Delivery]:
        """Failures of any rank, on every rank."""
        found: dict[int, Delivery] = {}
        for told in gather_json(failures, self._cpu_group):
            for server, detail in told.items():
                found.setdefault(int(server), Delivery("failed", detail))
        return found

    def _together(self, is_done: Callable[[], bool]) -> None:
        """Wait until rank 0 says so; nobody waits long without a sign of life."""
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

    def _recipe(self, server: int) -> Recipe:
        return Recipe(
            host=self._meeting.host,
            port=self._store.port,
            attempt=f"transfer/{self._num_attempts}",
            server=server,
            shape=self._shape,
            training=self._training,
            rollout=self._rollout,
            bucket_elements=self._bucket_elements,
            dtype=self._dtype,
            backend=self._backend,
            timeout_s=self._meeting.timeout_s,
        )

    def _open_store(self) -> dist.TCPStore:
        timeout, host = timedelta(seconds=self._meeting.timeout_s), self._meeting.host
        store = None
        if self._rank == 0:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = broadcast_json(store.port if store else None, self._cpu_group)
        store = store or dist.TCPStore(host, port, is_master=False, timeout=timeout)
        dist.barrier(self._cpu_group)  # nobody may leave before all have come
        return store


class _Link:
    """To one server. After the first failure nothing more is sent over it."""

    def __init__(self, server: int, name: str, group: Channel) -> None:
        self.server, self.name, self._group = server, name, group
        self.error = ""

    def send(self, flat: Tensor, rank: int, tag: int, limit: timedelta) -> _Sent | None:
        """Start to send; None once the link has failed."""
        if self.error:
            return None
        try:
            return _Sent(self._group.send([flat], rank, tag), self, limit)
        except RuntimeError as error:
            self.error = _short(error)
            return None


@dataclass
class _Sent:
    """A message under way over a link."""

    work: TimedWork
    link: _Link
    limit: timedelta

    def wait(self) -> None:
        """Until it has arrived, or its link has failed."""
        if self.link.error:
            return
        try:
            self.work.wait(self.limit)
        except RuntimeError as error:
            self.link.error = _short(error)


def _first_senders(copies: Sequence[Copy], tp_size: int) -> dict[int, int]:
    """Who sends each piece to the first server."""
    return {copy.piece.index: copy.sender for copy in copies if copy.receiver < tp_size}


def _problem(future: Future[str | None]) -> str | None:
    """What a finished request says went wrong."""
    try:
        return future.result()
    except Exception as error:  # on rank 0 alone: raising here would leave the others waiting
        return _short(error) or type(error).__name__


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
