"""``sglang-router`` in front of several servers: it sends a prompt where a prefix of it is cached already.

Rank 0 runs it and tells it which servers serve; its own health checks, retries and circuit breakers are off, because the
fleet knows more: a server may be well and still not be allowed to serve, until it has the current weights.

The servers can do without it: when it dies or stops to answer, requests go to them directly, and the run goes on.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from megatron_rl.errors import UserError
from megatron_rl.process.child import ChildProcess, how_it_ended
from megatron_rl.process.network import HeldPort
from megatron_rl.rollout.sglang.client import SGLangClient
from megatron_rl.rollout.sglang.fleet import Server

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0
WATCH_S = 5.0
"""Between two looks whether it answers."""


class Router:
    """The router process, and its list of servers."""

    def __init__(self, log: Path, *, request_timeout_s: float, health_timeout_s: float) -> None:
        """Start it.

        Args:
            log: of its output.
            request_timeout_s: after which it gives a request up.
            health_timeout_s: silence after which it is given up.
        """
        self._health_timeout_s = health_timeout_s
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._ports = [HeldPort("127.0.0.1"), HeldPort("127.0.0.1")]
        port, metrics_port = (str(held.number) for held in self._ports)
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *(sys.executable, "-m", "megatron_rl.rollout.sglang_router", "--host", "127.0.0.1"),
            *("--port", port, "--prometheus-port", metrics_port),
            *("--policy", "cache_aware", "--request-timeout-secs", str(int(request_timeout_s) + 1)),
            *("--disable-retries", "--disable-circuit-breaker", "--disable-health-check", "--log-level", "warn"),
        ]
        self._process = ChildProcess(command, log=log, environment={})
        self._watcher: asyncio.Task[None] | None = None
        self._ids: dict[str, str] = {}
        self.client: SGLangClient | None = None
        """For requests; None until the router answers."""

    async def connect(self, session: aiohttp.ClientSession) -> None:
        """Wait until it answers.

        Raises:
            UserError: it does not start.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        self._session = session
        while True:
            status = self._process.status()
            if status is not None or time.monotonic() > deadline:
                how = "did not answer" if status is None else how_it_ended(status, self._log, self._log_start)
                raise UserError(
                    "rollout.servers.use_router",
                    True,
                    f"the router {how}",
                    f"see {self._log}, or set use_router=false",
                )
            try:
                async with session.get(f"{self.url}/workers"):
                    break
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)
        self.client = SGLangClient(self.url, session, admin_key=None)
        self._watcher = asyncio.create_task(self._watch())

    async def add(self, server: Server) -> None:
        """Let a server have requests; returns when the router has taken it in."""
        if server.client.url not in self._ids:
            await self._or_give_up(self._add(server.client.url))

    async def remove(self, server: Server) -> None:
        """Give a server nothing more."""
        worker = self._ids.pop(server.client.url, None)
        if worker is not None:
            await self._or_give_up(self._call("DELETE", f"/workers/{quote(worker)}"))

    def is_lost(self) -> bool:
        """Whether it is gone for good."""
        return self._process.status() is not None

    async def stop_watching(self) -> None:
        """Before the event loop ends."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    def close(self) -> None:
        """End it. Harmless when repeated."""
        self._process.kill()
        for port in self._ports:
            port.close()

    async def _add(self, url: str) -> None:
        self._ids[url] = (await self._call("POST", "/workers", {"url": url}))["worker_id"]
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while url not in {worker["url"] for worker in (await self._call("GET", "/workers"))["workers"]}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"it has not taken {url} in")
            await asyncio.sleep(0.05)

    async def _watch(self) -> None:
        while not self.is_lost():
            await asyncio.sleep(WATCH_S)
            await self._or_give_up(self._call("GET", "/workers", timeout_s=self._health_timeout_s))

    async def _or_give_up(self, work: Coroutine[Any, Any, Any]) -> None:
        """A router that fails is ended: what it still holds breaks off at once and is asked again elsewhere."""
        if self.is_lost():
            work.close()
            return
        try:
            await work
        except (aiohttp.ClientError, OSError, KeyError) as error:  # TimeoutError is an OSError
            print(f"the router is given up ({type(error).__name__} {error}); see {self._log}", flush=True)
            self.close()

    async def _call(
        self, method: str, path: str, body: dict[str, str] | None = None, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
            response.raise_for_status()
            return await response.json()
