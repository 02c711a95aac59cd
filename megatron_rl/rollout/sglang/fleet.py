"""State of the servers on rank 0: which may serve now, and which need the current weights first.

    unknown --answers--> stale --weights sent--> serving --gives no sign of life--> down --answers--> stale (or serving,
                                                                                     if its weights are still current)

Lives in one event loop; nothing here is called from another thread except through ``loop.LoopThread``.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_rl.config.rollout import ServersConfig, WeightSyncConfig
from megatron_rl.errors import UserError
from megatron_rl.process import activity
from megatron_rl.rollout.sglang.client import Refused, SGLangClient, Unauthorized, Unavailable
from megatron_rl.rollout.sglang.flags import WEIGHT_LOADER
from megatron_rl.rollout.sglang.versions import Adapter, adapter_for

POLL_S = 0.5
"""Seconds between two questions to a server that is down."""
HOME_SLACK = 16
"""A server keeps its home requests while it has at most 2 x the least loaded server + this in flight."""
STATE_TIMEOUT_S = 10.0
"""Deadline of questions that a healthy server answers at once."""


@dataclass
class Server:
    """One server and its state."""

    index: int
    client: SGLangClient
    log: Path | None = None
    """Log file of a server of ours."""
    state: Literal["down", "stale", "serving"] = "down"
    is_known: bool = False
    """True once it has answered and passed the checks; its adapter and sizes are known."""
    adapter: Adapter | None = None
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    takes_payloads: bool = False
    """True if it was started with our weight loader, and its ranks are one tensor-parallel group."""
    in_flight: int = 0
    last_sign_s: float = field(default_factory=time.monotonic)
    reason: str = "has not answered yet"
    num_lost_updates: int = 0
    """Weight updates in a row in which it stopped answering."""
    has_released: bool = False
    """True while its memory belongs to the trainer."""
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock of health checks: SGLang answers one by generating a token, which some calls do not survive."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the server is down, so that requests to it stop waiting for a reply."""

    @property
    def name(self) -> str:
        """Number and URL, for messages."""
        return f"server {self.index} ({self.client.url})"


class Fleet:
    """All servers, and the tasks that watch them."""

    def __init__(
        self,
        servers: Sequence[Server],
        config: ServersConfig,
        sync: WeightSyncConfig,
        *,
        check: Callable[[Server, dict[str, Any]], None],
    ) -> None:
        """Take the servers; no request is made before ``start``.

        Args:
            servers: at least one.
            config: deadlines.
            sync: pause mode and deadline of updates.
            check: raises ``UserError`` for a server (with its info) that cannot serve this run.
        """
        self.servers, self.config, self.sync = list(servers), config, sync
        self.version = -1
        self.counts: Counter[str] = Counter()
        """Mended failures since the last look, by reason."""
        self.failure: UserError | None = None
        """Error that ends the run, if any."""
        self._check = check
        self._changed = asyncio.Condition()
        self._watchers: list[asyncio.Task[None]] = []
        self._probe: asyncio.Task[None] | None = None
        self._is_quiet = False
        """True while weights are loading or memory is released; health checks are off."""
        self.may_start = True
        """False while servers that are down stay down, because the trainer has their memory: none is overdue then."""

    def start(self) -> None:
        """Start to watch the servers."""
        self._watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def stop(self) -> None:
        """Stop watching the servers."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------ who serves

    def serving(self) -> list[Server]:
        """Return the servers that answer and have the current weights."""
        return [server for server in self.servers if server.state == "serving"]

    def stale(self) -> list[Server]:
        """Return the servers that answer and need the current weights."""
        return [server for server in self.servers if server.state == "stale"]

    @property
    def capacity(self) -> int:
        """Most requests in flight at all serving servers; at least one server's, so that work waits for it."""
        return self.config.max_in_flight * max(1, len(self.serving()))

    async def choose(self, home: int) -> Server:
        """Wait for a serving server with room, and count a request in flight there.

        Args:
            home: requests with the same number prefer the same server, which has their common prefix in its cache. If that
                server is much busier than another, the one with the fewest in flight is chosen.
        """
        async with self._changed:
            while True:
                free = [s for s in self.serving() if s.in_flight < self.config.max_in_flight]
                if free:
                    server = min(free, key=lambda s: s.in_flight)
                    at_home = [s for s in free if s.index == home % len(self.servers)]
                    if at_home and at_home[0].in_flight <= 2 * server.in_flight + HOME_SLACK:
                        server = at_home[0]
                    server.in_flight += 1
                    return server
                await self._changed.wait()

    async def give_back(self, server: Server) -> None:
        """Count the end of a request that ``choose`` placed."""
        async with self._changed:
            server.in_flight -= 1
            self._changed.notify_all()

    async def mark_down(self, server: Server, reason: str) -> None:
        """Stop using a server until it answers again."""
        async with self._changed:
            if server.state == "down":
                return
            server.state, server.reason, server.has_released = "down", reason, False
            server.lost.set()
            self._changed.notify_all()
        self.counts["server_down"] += 1

    async def probe(self) -> None:
        """Ask every serving server for its state after a request failed for an unknown reason.

        Many requests fail together, so they share one probe.
        """
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._ask_all())
        await asyncio.shield(self._probe)

    async def _ask_all(self) -> None:

        async def one(server: Server) -> None:
            try:
                if await server.client.weight_version(STATE_TIMEOUT_S) != str(self.version):
                    await self.mark_down(server, "serves other weights")
            except (Unavailable, Refused) as error:
                await self.mark_down(server, str(error))

        await asyncio.gather(*(one(server) for server in self.serving()))

    def describe(self) -> str:
        """Return one line about the servers that do not serve."""
        return "; ".join(
            f"{s.name} is {s.state}: {s.reason}{f', see {s.log}' if s.log else ''}"
            for s in self.servers
            if s.state != "serving"
        )

    # ------------------------------------------------------------------------------------------------ watching

    async def _watch(self, server: Server) -> None:
        while True:
            if server.state == "serving" and not self._is_quiet:
                await asyncio.sleep(self.config.health_interval_s)
                async with server.asking:
                    if not self._is_quiet:
                        await self._check_serving(server)
            else:
                await asyncio.sleep(POLL_S)
                if server.state == "down":
                    await self._check_down(server)

    async def _check_serving(self, server: Server) -> None:
        try:
            await server.client.check_health(self.config.health_timeout_s)
            server.last_sign_s = time.monotonic()
            activity.beat()  # with long responses nothing ends for minutes, though nothing hangs
        except (Unavailable, Refused) as error:
            if self._is_quiet or server.state != "serving":
                server.last_sign_s = time.monotonic()  # loading weights keeps its scheduler busy
                return
            is_gone = isinstance(error, Unavailable) and error.reason == "connection"
            silent_s = time.monotonic() - server.last_sign_s
            if is_gone or silent_s >= self.config.health_timeout_s:
                await self.mark_down(server, f"no sign of life for {silent_s:.0f} s ({error})")

    async def _check_down(self, server: Server) -> None:
        try:
            if not server.is_known:
                await self._get_to_know(server)
            # An answer of the scheduler: one of the HTTP process alone would bring a frozen server back for another update.
            version = str((await server.client.info(STATE_TIMEOUT_S)).get("weight_version"))
        except Unavailable as error:
            if server.is_known:  # of one that is still starting there is nothing else to expect
                server.reason = str(error)
            self._fail_if_none_for_too_long()
            return
        except Refused as error:
            server.reason = str(error)
            if isinstance(error, Unauthorized):
                self.failure = self.failure or UserError(
                    "rollout.servers.key_file",
                    None,
                    f"has not the key that {server.name} asks for",
                    "name a file with the key that the server was started with",
                )
            self._fail_if_none_for_too_long()
            return
        except UserError as error:
            self.failure = self.failure or error
            return
        is_current = self.version >= 0 and version == str(self.version)
        await self._set_state(server, "serving" if is_current else "stale")

    async def _get_to_know(self, server: Server) -> None:
        info = await server.client.info(STATE_TIMEOUT_S)
        server.adapter = adapter_for(str(info.get("version")), server.client.url)
        server.tensor_parallel_size, server.expert_parallel_size = int(info["tp_size"]), int(info.get("ep_size", 1))
        is_plain = all(int(info.get(name) or 1) == 1 for name in ("pp_size", "dp_size"))
        server.takes_payloads = is_plain and WEIGHT_LOADER in (info.get("custom_weight_loader") or [])
        self._check(server, info)
        server.is_known = True

    async def _set_state(self, server: Server, state: Literal["stale", "serving"]) -> None:
        async with self._changed:
            server.state, server.last_sign_s = state, time.monotonic()
            if state == "serving":
                server.lost.clear()
            self._changed.notify_all()

    def _fail_if_none_for_too_long(self) -> None:
        limit_s = self.config.start_timeout_s
        if self.may_start and all(
            s.state == "down" and time.monotonic() - s.last_sign_s > limit_s for s in self.servers
        ):
            self.failure = self.failure or UserError(
                "rollout.servers",
                [s.client.url for s in self.servers],
                f"no server answered for {limit_s:g} s ({self.describe()})",
                "see their logs where they run, check that this machine reaches them, or raise rollout.servers.start_timeout_s",
            )

    # ------------------------------------------------------------------------------------------------ weights

    async def withdraw(self, version: int) -> None:
        """Take all servers out of service until they have the weights of this version."""
        self.version = version
        for server in self.serving():
            await self._set_state(server, "stale")

    async def begin_update(self, targets: Iterable[Server]) -> None:
        """Pause the targets and stamp them; those that do not answer are down from now on.

        While a late or restarted server catches up, the others go on serving.
        """
        self._is_quiet = True
        version, limit_s = self.version, self.config.health_timeout_s
        await self._each(
            targets,
            lambda s, adapter: s.client.begin_update(
                version, pause_mode=self.sync.pause_mode, adapter=adapter, timeout_s=limit_s
            ),
        )

    async def send(self, targets: Iterable[Server], bucket: str) -> None:
        """Load a bucket on every target that is not down."""
        await self._each(
            targets,
            lambda s, _: s.client.send(
                bucket, tensor_parallel_size=s.tensor_parallel_size, timeout_s=self.sync.timeout_s
            ),
        )

    async def load_checkpoint(self, targets: Iterable[Server], path: str) -> None:
        """Let every target that is not down load a checkpoint from its file system."""
        await self._each(targets, lambda s, _: s.client.load_checkpoint(path, timeout_s=self.sync.timeout_s))

    async def post(self, server: Server, payload: str) -> str | None:
        """Give a payload to our weight loader in the server's ranks, and wait until they are done with it.

        Returns:
            None, or what went wrong. A server that did not answer is down then.
        """
        try:
            await server.client.send(
                payload,
                tensor_parallel_size=server.tensor_parallel_size,
                loader=WEIGHT_LOADER,
                timeout_s=self.sync.timeout_s,
            )
        except Unavailable as error:
            await self._lose(server, error)
            return str(error)
        except Refused as error:
            return str(error)
        return None

    async def end_update(self, targets: Iterable[Server]) -> None:
        """Put the targets into service."""
        version = self.version

        async def end(server: Server, adapter: Adapter) -> None:
            await server.client.end_update(
                version,
                pause_mode=self.sync.pause_mode,
                adapter=adapter,
                timeout_s=self.config.health_timeout_s,
                patience_s=self.sync.timeout_s,
            )
            server.num_lost_updates = 0
            await self._set_state(server, "serving")

        await self._each(targets, end)
        self._is_quiet = False

    async def _each(self, targets: Iterable[Server], call: Callable[[Server, Adapter], Awaitable[None]]) -> None:
        async def one(server: Server) -> None:
            if server.state == "down":
                return
            assert server.adapter is not None
            try:
                await call(server, server.adapter)
            except Unavailable as error:
                await self._lose(server, error)

        outcomes = await asyncio.gather(*(one(server) for server in targets), return_exceptions=True)
        for outcome in outcomes:  # every server has finished before the first error is raised
            if isinstance(outcome, BaseException):
                raise outcome

    async def _lose(self, server: Server, error: Unavailable) -> None:
        """Stop using a server that stopped answering in an update; give it up if it does so again and again."""
        await self.mark_down(server, f"during a weight update: {error}")
        server.num_lost_updates += 1
        if server.num_lost_updates > self.config.max_retries:
            self.failure = self.failure or UserError(
                "rollout.servers.max_retries",
                self.config.max_retries,
                f"{server.name} was lost in {server.num_lost_updates} weight updates in a row, the last time because {error}",
                f"see {server.log or 'its log'}",
            )

    def has_answer_of(self, urls: Iterable[str]) -> bool:
        """Check whether none of these servers is down, so that each can be asked for its memory."""
        up = {server.client.url for server in self.servers if server.state != "down"}
        return up.issuperset(urls)

    async def release_memory(self) -> None:
        """Release the memory of all servers that are up; health checks are off until new weights are in."""
        self._is_quiet, self.may_start = True, False

        async def release(server: Server, _: Adapter) -> None:
            if server.has_released:
                return
            async with server.asking:  # a running health check ends first
                await server.client.release_memory(self.sync.timeout_s)
            server.has_released = True

        await self._each(self.servers, release)

    async def resume_memory(self) -> None:
        """Give released memory back; one that ended meanwhile is started now, and has its whole time limit for that."""
        self.may_start = True
        for server in self.servers:
            server.last_sign_s = time.monotonic()

        async def resume(server: Server, _: Adapter) -> None:
            await server.client.resume_memory(self.sync.timeout_s)
            server.has_released = False

        await self._each([server for server in self.servers if server.has_released], resume)
