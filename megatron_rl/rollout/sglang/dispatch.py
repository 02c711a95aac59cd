"""Dispatch of requests on rank 0's event loop: bounded in flight, with a deadline and bounded retries for each.

Every request has one slot in the result, and a slot is filled once. So when a server dies, no prompt is lost and none is
counted twice.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Coroutine, Sequence
from typing import Any, Generic, TypeVar

from megatron_rl.errors import UserError
from megatron_rl.rollout.growth import Branch, Expand, Key
from megatron_rl.rollout.sglang.client import Refused, Unavailable
from megatron_rl.rollout.sglang.fleet import Fleet, Server
from megatron_rl.types import Completion, Request

What = TypeVar("What")


class _InFlight(Generic[What]):
    """Requests in flight, returned one at a time as they end. (``asyncio.wait`` would scan all of them each time.)"""

    def __init__(self) -> None:
        self._of: dict[asyncio.Task[Completion], What] = {}
        self._ended: asyncio.Queue[asyncio.Task[Completion]] = asyncio.Queue()

    def __len__(self) -> int:
        return len(self._of)

    def start(self, work: Coroutine[Any, Any, Completion], what: What) -> None:
        """Start a request; ``next_done`` returns ``what`` with its completion."""
        task = asyncio.create_task(work)
        self._of[task] = what
        task.add_done_callback(self._ended.put_nowait)

    async def next_done(self) -> tuple[What, Completion]:
        """Wait for the next request that ends; an error of it is raised here."""
        task = await self._ended.get()
        return self._of.pop(task), task.result()

    async def cancel(self) -> None:
        """Cancel the remaining requests, and wait until they have ended."""
        for task in self._of:
            task.cancel()
        await asyncio.gather(*self._of, return_exceptions=True)


class Dispatch:
    """Places requests on the servers that serve."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        stop_ids: Sequence[int],
        experts: tuple[int, int] | None = None,
    ) -> None:
        """Args:
        fleet: the servers.
        stop_ids: token ids that end a response.
        experts: (layers, experts per token) if completions carry the chosen experts.
        """
        self.fleet, self.stop_ids = fleet, list(stop_ids)
        self.experts = experts
        self.num_done = 0
        """Requests done in the current ``run``."""

    async def run(self, requests: Sequence[Request], *, group_size: int, num_groups: int) -> list[Completion | None]:
        """Complete requests until enough groups are whole; cancel the rest.

        Requests of a group prefer one server. The first of each group goes before all others, so that its server has the
        prompt in its prefix cache when those come.

        Args:
            requests: consecutive ``group_size`` ones are a group.
            group_size: divides the number of requests.
            num_groups: whole groups that suffice.

        Returns:
            One entry per request; None in groups that were not whole in time.

        Raises:
            UserError: a request failed too often, or was refused.
        """
        self.num_done = 0
        results: list[Completion | None] = [None] * len(requests)
        missing = [group_size] * (len(requests) // group_size)
        num_whole = 0
        in_flight: _InFlight[int] = _InFlight()
        try:
            for index in sorted(range(len(requests)), key=lambda index: index % group_size > 0):
                in_flight.start(self._complete(requests[index], home=index // group_size), index)
            while len(in_flight) and num_whole < num_groups:
                index, results[index] = await in_flight.next_done()
                self.num_done += 1
                missing[index // group_size] -= 1
                num_whole += missing[index // group_size] == 0
        finally:  # SGLang stops a request once its connection is closed
            await in_flight.cancel()
        whole = [count == 0 for count in missing]
        return [result if whole[i // group_size] else None for i, result in enumerate(results)]

    async def grow(self, seeds: Sequence[Branch], expand: Expand) -> dict[Key, Completion]:
        """Complete branches and all their descendants, each the moment its parent is complete.

        If there are more than the servers take at once, those with the most tokens still to come go first: they decide when
        all is done. Branches of one prompt prefer one server, which has their common prefixes in its cache.

        Args:
            seeds: the first branches.
            expand: gives the children of a completed branch.

        Raises:
            UserError: as ``run``.
        """
        self.num_done = 0
        grown: dict[Key, Completion] = {}
        known: set[Key] = set()
        waiting: list[tuple[int, int, Branch]] = []
        in_flight: _InFlight[Branch] = _InFlight()

        def add(branches: Sequence[Branch]) -> None:
            for branch in branches:
                if branch.key not in known:
                    known.add(branch.key)
                    heapq.heappush(waiting, (-branch.tokens_to_come, len(known), branch))

        try:
            add(seeds)
            while waiting or len(in_flight):
                while waiting and len(in_flight) < self.fleet.capacity:
                    branch = heapq.heappop(waiting)[2]
                    in_flight.start(self._complete(branch.request, home=branch.key[0]), branch)
                branch, completion = await in_flight.next_done()
                grown[branch.key] = completion
                self.num_done += 1
                add(expand(branch, completion))
        finally:
            await in_flight.cancel()
        return grown

    async def _complete(self, request: Request, home: int) -> Completion:
        config = self.fleet.config
        failures: list[str] = []
        while len(failures) <= config.max_retries:
            server = await self.fleet.choose(home)
            try:
                return await self._attempt(request, server)
            except Unavailable as error:
                failures.append(str(error))
                self.fleet.counts[f"retried_{error.reason}"] += 1
                await self._look_after(server, error)
            except Refused as error:
                raise UserError(
                    "rollout", f"a prompt of {len(request.prompt_ids)} tokens", f"was refused ({error})",
                    "see the server's log; a prompt with its response must fit its context and its KV pool",
                ) from error  # fmt: skip
            finally:
                await self.fleet.give_back(server)
        raise UserError(
            "rollout.servers.max_retries",
            config.max_retries,
            f"a request failed {len(failures)} times; last: {failures[-1]}",
            "see the servers' logs",
        )

    async def _attempt(self, request: Request, server: Server) -> Completion:
        """Ask a server once; this ends early if the server goes down."""
        assert server.adapter is not None
        reply = asyncio.ensure_future(
            server.client.generate(
                request,
                stop_ids=self.stop_ids,
                experts=self.experts if request.record_experts else None,
                adapter=server.adapter,
                version=self.fleet.version,
                timeout_s=self.fleet.config.request_timeout_s,
            )
        )
        waits = {reply, asyncio.ensure_future(server.lost.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if reply.done():
                return reply.result()
            raise Unavailable("server_lost", f"{server.name} went down: {server.reason}")
        finally:
            for wait in waits:
                wait.cancel()

    async def _look_after(self, server: Server, error: Unavailable) -> None:
        """Find out after a failure which servers are gone, so that the retry goes elsewhere."""
        if error.reason in ("connection", "stale", "timeout", "server_error"):
            await self.fleet.probe()
        await asyncio.sleep(0.05)  # spaces out retries while a server that looks alive fails at once
