"""Meetings of trainer ranks and servers: who takes part in a transfer, over which groups, and how it went.

    rank 0      spec -> server ranks -> "ready" ... verdict ... the transfer ... reports of the server's ranks
    all ranks                                      join     their part          outcome

Both ends meet in a store that rank 0 holds. A server that is reached over the network has a group of its ranks and the trainer
ranks that send to it, so that a fault of one server concerns no other. A group lives until its server dies.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch.distributed as dist

from megatron_rl.parallel.agree import broadcast_json, gather_json
from megatron_rl.process import activity
from megatron_rl.process.signed_store import SignedStore, open_store
from megatron_rl.weight_sync.network import JOIN_S, make_group
from megatron_rl.weight_sync.places import Places
from megatron_rl.weight_sync.served import RolloutLayout
from megatron_rl.weight_sync.spec import Transfer, TransferSpec

LOOK_S = 0.01
"""Seconds between two looks of rank 0 for answers."""

Post = Callable[[int, bytes], Future[str | None]]
"""Hands a payload to a server, on rank 0 (``ServerPort.post``)."""


@dataclass(frozen=True)
class Rendezvous:
    """Address and means by which both ends meet."""

    host: str
    """Address of rank 0 that servers reach; other ranks may give any."""
    network: Literal["gloo", "nccl"]
    """Means between machines; within one it is memory."""
    timeout_s: float
    bucket_bytes: int
    places: Callable[[RolloutLayout], Places]
    """Tells where trainer ranks and the ranks of servers of a layout run."""


@dataclass(frozen=True)
class Delivery:
    """The outcome of one server's update."""

    state: Literal["proven", "loaded", "mismatch", "failed", "unfit"]
    """``proven``: both ends have the same digests. ``loaded``: SGLang has taken whole tensors, of which there are none.
    ``unfit``: the server's parameters are not cut as the plan says, and nothing was sent."""
    detail: str
    """Reason in words; empty if all went well."""

    @property
    def is_good(self) -> bool:
        """Whether the server has the weights."""
        return self.state in ("proven", "loaded")


class ServerMeeting:
    """The trainer's end of all meetings. Methods are collectives unless they say otherwise."""

    def __init__(self, rendezvous: Rendezvous, cpu_group: dist.ProcessGroup) -> None:
        """Open the store on rank 0; servers are met only in ``join``."""
        host = str(broadcast_json(rendezvous.host, cpu_group))  # each rank has the address of its own machine
        self.rendezvous, self.cpu_group = replace(rendezvous, host=host), cpu_group
        self.rank = dist.get_rank(cpu_group)
        self.store_key = str(broadcast_json(secrets.token_hex(32), cpu_group))
        self.store, self.port = self._open_store()
        self._known: dict[str, str] = {}
        """On rank 0, by cargo and server: name of the last group that both ends made."""
        self._groups: dict[str, tuple[str, Any]] = {}
        """By cargo and server: name and group of a transfer over the network that went well."""
        self._name = str(broadcast_json(uuid.uuid4().hex, cpu_group))
        """Sets this trainer's groups apart from those that a server remembers of an earlier trainer."""
        self._num_attempts = 0

    def invite(
        self, servers: Sequence[int], transfer: Transfer, post: Post | None
    ) -> tuple[dict[int, TransferSpec], dict[int, Future[str | None]]]:
        """Hand the servers the specs of a transfer; return the specs, and on rank 0 the answers to come."""
        self._num_attempts += 1
        specs = {
            server: TransferSpec(
                host=self.rendezvous.host,
                port=self.port,
                store_key=self.store_key,
                attempt=f"transfer/{self._name}/{self._num_attempts}",
                server=server,
                transfer=transfer,
                network=self.rendezvous.network,
                timeout_s=self.rendezvous.timeout_s,
            )
            for server in servers
        }
        return specs, {server: post(server, spec.to_json()) for server, spec in specs.items()} if post else {}

    def join(
        self, specs: Mapping[int, TransferSpec], futures: Mapping[int, Future[str | None]]
    ) -> tuple[list[int], dict[int, Delivery]]:
        """Meet the servers' ranks.

        Returns:
            The servers that take part, on which both ends agree from now on; and those that do not, or cannot any more.
        """
        verdicts: dict[int, list[str]] = {}

        def look() -> bool:
            for server in specs.keys() - verdicts.keys():
                if (verdict := self._readiness(specs[server], futures[server])) is not None:
                    verdicts[server] = verdict
            return len(verdicts) == len(specs)

        self.together(look)
        verdicts = {int(server): verdict for server, verdict in broadcast_json(verdicts, self.cpu_group).items()}
        there = sorted(server for server, (state, _) in verdicts.items() if state == "there")
        if self.rank == 0:
            for server, spec in specs.items():
                answer = {"servers": there if server in there else [], "group": verdicts[server][1]}
                self.store.set(spec.key("verdict"), json.dumps(answer))
        lost = {server: Delivery(*verdict) for server, verdict in verdicts.items() if server not in there}  # type: ignore[arg-type]
        failures = {}
        for server in there:
            spec, name = specs[server], verdicts[server][1]
            senders = spec.senders()
            if self.rank in senders and self._groups.get(spec.pair, ("",))[0] != name:
                try:
                    self._groups[spec.pair] = (name, self._make_group(name, senders, spec.transfer.rollout.tp_size))
                except RuntimeError as error:
                    failures[server] = f"rank {self.rank} could not join: {short(error)}"
            if server in futures:
                futures[server].add_done_callback(partial(self._tell_if_gone, spec))
        return there, lost | self.agree(failures)

    def group(self, spec: TransferSpec) -> Any:
        """Return the group of a server that was met, if this rank is in it; no collective."""
        return self._groups.get(spec.pair, ("", None))[1]

    def group_names(self) -> dict[str, str]:
        """Return the names of this rank's groups, by cargo and server; no collective."""
        return {pair: name for pair, (name, _) in self._groups.items()}

    def forget_groups(self, specs: Mapping[int, TransferSpec], deliveries: Mapping[int, Delivery]) -> None:
        """Drop the groups of servers whose transfer did not go well; no collective."""
        for server, delivery in deliveries.items():
            if not delivery.is_good and server in specs:
                self._groups.pop(specs[server].pair, None)
                self._known.pop(specs[server].pair, None)

    def problem(self, spec: TransferSpec) -> str | None:
        """Return why a server is gone, or None; no collective."""
        return self.store.get(spec.key("gone")).decode() if self.store.check([spec.key("gone")]) else None

    def conclude(
        self,
        servers: Sequence[int],
        specs: Mapping[int, TransferSpec],
        futures: Mapping[int, Future[str | None]],
        judge: Callable[[int, Sequence[dict[str, Any]]], Delivery],
    ) -> dict[int, Delivery]:
        """Wait for the reports of servers that were handed everything, and return their outcome.

        Args:
            servers: those.
            specs: of all that were invited.
            futures: as ``invite`` returned them.
            judge: on rank 0, returns the outcome of a server from its ranks' reports.
        """
        self.together(lambda: all(futures[server].done() for server in servers))
        deliveries: dict[int, Delivery] = {}
        if self.rank == 0:
            for server in servers:
                found = self._reports(specs[server], futures[server])
                deliveries[server] = Delivery("failed", found) if isinstance(found, str) else judge(server, found)
            for spec in specs.values():
                self._forget(spec)
        outcomes = broadcast_json({s: [d.state, d.detail] for s, d in deliveries.items()}, self.cpu_group)
        return {int(server): Delivery(*parts) for server, parts in outcomes.items()}

    def agree(self, failures: Mapping[int, str]) -> dict[int, Delivery]:
        """Return the failures of any rank, on every rank."""
        found: dict[int, Delivery] = {}
        for of_rank in gather_json(failures, self.cpu_group):
            for server, detail in of_rank.items():
                found.setdefault(int(server), Delivery("failed", detail))
        return found

    def together(self, is_done: Callable[[], bool]) -> None:
        """Wait on all ranks until a condition holds on rank 0, with a watchdog beat every second."""
        while True:
            deadline, done = time.monotonic() + 1.0, False
            while self.rank == 0 and not (done := is_done()) and time.monotonic() < deadline:
                time.sleep(LOOK_S)
            activity.beat()
            if broadcast_json(done, self.cpu_group):
                return

    # ------------------------------------------------------------------------------------------------ rank 0's part

    def _readiness(self, spec: TransferSpec, future: Future[str | None]) -> list[str] | None:
        """Return ["there", name of its group] or [state, detail of the failure]; None while it is not known."""
        keys = [spec.key("ready", tp_rank) for tp_rank in range(spec.transfer.rollout.tp_size)]
        if not self.store.check(keys):
            return ["failed", _problem_of(future) or "its ranks never became ready"] if future.done() else None
        try:
            answers = [json.loads(self.store.get(key)) for key in keys]
        except RuntimeError as error:  # a stranger's words
            return ["failed", short(error)]
        for tp_rank, ready in enumerate(answers):
            if ready["unfit"]:
                return ["unfit", f"rank {tp_rank}: {ready['unfit']}"]
        name = self._known.get(spec.pair, "")
        is_kept = name and all(name in ready["groups"] for ready in answers)
        if not is_kept:
            self._known[spec.pair] = name = spec.key("group")
        return ["there", name]

    def _tell_if_gone(self, spec: TransferSpec, future: Future[str | None]) -> None:
        """Tell all ranks that a server is gone; those that share memory with it cannot notice."""
        if (problem := _problem_of(future)) is not None:
            self.store.set(spec.key("gone"), problem)

    def _reports(self, spec: TransferSpec, future: Future[str | None]) -> list[dict[str, Any]] | str:
        """Return what a server's ranks report, or why there is nothing good to report."""
        if (problem := _problem_of(future)) is not None:
            return problem
        reports = []
        for tp_rank in range(spec.transfer.rollout.tp_size):
            key = spec.key("report", tp_rank)
            if not self.store.check([key]):
                return f"its rank {tp_rank} reported nothing"
            try:
                reports.append(json.loads(self.store.get(key)))
            except RuntimeError as error:  # a stranger's words
                return short(error)
            if "error" in reports[-1]:
                return f"its rank {tp_rank} reported {reports[-1]['error']}"
        return reports

    def _forget(self, spec: TransferSpec) -> None:
        """Remove the keys of a transfer, because a run makes thousands of them."""
        ranks = range(spec.transfer.rollout.tp_size)
        names = [spec.key("verdict"), spec.key("gone")]
        names += [spec.key(what, tp_rank) for what in ("ready", "report") for tp_rank in ranks]
        names += [spec.stream_key(rank) for rank in range(spec.transfer.training.num_ranks)]
        for name in names:
            self.store.delete_key(name)

    # ------------------------------------------------------------------------------------------------ store and groups

    def _make_group(self, name: str, senders: Sequence[int], tp_size: int) -> Any:
        timeout_s, host = min(JOIN_S, self.rendezvous.timeout_s), self.rendezvous.host
        rank, size = senders.index(self.rank), len(senders) + tp_size
        return make_group(self.rendezvous.network, self.store, name, rank, size, host=host, timeout_s=timeout_s)

    def _open_store(self) -> tuple[SignedStore, int]:
        """Return the store of this trainer, which listens on rank 0, and its port."""
        host, key = self.rendezvous.host, bytes.fromhex(self.store_key)
        timeout = timedelta(seconds=self.rendezvous.timeout_s)
        own = open_store(host, key, port=None, timeout=timeout) if self.rank == 0 else None
        port = int(broadcast_json(own and own[1], self.cpu_group))
        opened = own or open_store(host, key, port=port, timeout=timeout)
        dist.barrier(self.cpu_group)  # no rank leaves before all are connected
        return opened


def _problem_of(future: Future[str | None]) -> str | None:
    """Return what went wrong in a finished request, or None."""
    try:
        return future.result()
    except Exception as error:  # on rank 0 alone: raising here would leave the others waiting
        return short(error) or type(error).__name__


def short(error: BaseException) -> str:
    """Return an error's words on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]
