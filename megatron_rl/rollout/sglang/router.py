"""``sglang-router`` in front of several servers: it sends a prompt where a prefix of it is cached already.

Rank 0 runs it and tells it which servers serve; its own health checks, retries and circuit breakers are off, because the
fleet knows more: a server may be well and still not be allowed to serve, until it has the current weights.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from urllib.parse import quote

import aiohttp

from megatron_rl.errors import UserError
from megatron_rl.rollout.sglang.client import SGLangClient
from megatron_rl.rollout.sglang.fleet import Server
from megatron_rl.rollout.sglang.process import ChildProcess, describe_status, free_port, last_error

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0


class Router:
    """The router process, and its list of servers."""

    def __init__(self, log: Path, *, request_timeout_s: float) -> None:
        """Start it.

        Args:
            log: of its output.
            request_timeout_s: after which it gives a request up.
        """
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self.url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
        command = [
            *(sys.executable, "-m", "megatron_rl.rollout.sglang_router", "--host", "127.0.0.1"),
            *("--port", self.url.rpartition(":")[2], "--prometheus-port", str(free_port("127.0.0.1"))),
            *("--policy", "cache_aware", "--request-timeout-secs", str(int(request_timeout_s) + 1)),
            *("--disable-retries", "--disable-circuit-breaker", "--disable-health-check", "--log-level", "warn"),
        ]
        self._process = ChildProcess(command, log=log, environment={})
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
                how = "did not answer" if status is None else describe_status(status)
                raise UserError(
                    "rollout.servers.use_router",
                    True,
                    f"the router {how} ({last_error(self._log, self._log_start)})",
                    f"see {self._log}, or set use_router=false",
                )
            try:
                async with session.get(f"{self.url}/workers"):
                    break
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)
        self.client = SGLangClient(self.url, session, admin_key=None)

    async def add(self, server: Server) -> None:
        """Let a server have requests; returns when the router has taken it in."""
        url = server.client.url
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        async with self._session.post(f"{self.url}/workers", json={"url": url}, timeout=timeout) as response:
            response.raise_for_status()
            self._ids[url] = (await response.json())["worker_id"]
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while url not in await self._workers():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the router has not taken {url} in within {CALL_TIMEOUT_S:g} s, see {self._log}")
            await asyncio.sleep(0.05)

    async def remove(self, server: Server) -> None:
        """Give a server nothing more."""
        worker = self._ids.pop(server.client.url, None)
        if worker is not None:
            timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
            async with self._session.delete(f"{self.url}/workers/{quote(worker)}", timeout=timeout):
                pass

    async def _workers(self) -> set[str]:
        async with self._session.get(f"{self.url}/workers") as response:
            return {worker["url"] for worker in (await response.json())["workers"]}

    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self._process.status()

    def close(self) -> None:
        """End it. Harmless when repeated."""
        self._process.kill()
