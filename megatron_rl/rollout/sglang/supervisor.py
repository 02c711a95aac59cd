"""The server processes of one node: started, watched, restarted and stopped by the node's first rank.

A thread does this, because restarts must go on while the rank trains or waits in a collective. It knows processes, not
weights: a restarted server comes back with random weights (``load_format: dummy``), its stamp says so, and rank 0
(fleet.py) has the current weights delivered before it serves.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.config.rollout import ServersConfig
from megatron_rl.errors import UserError
from megatron_rl.process.child import ChildProcess, how_it_ended
from megatron_rl.rollout.sglang.leftovers import remove_leftovers

LOOK_S = 0.5


@dataclass
class Managed:
    """One server of this node."""

    name: str
    url: str
    log: Path
    start: Callable[[], ChildProcess]
    process: ChildProcess | None = None
    has_been_up: bool = False
    """True once it has answered since the run began."""
    is_up: bool = False
    """True once it has answered since its last start."""
    started_s: float = 0.0
    last_sign_s: float = 0.0
    log_start: int = 0
    """Size of the log before the last start, in bytes."""
    num_restarts: int = 0
    reasons: list[str] = field(default_factory=list)


class Supervisor:
    """Owner of the server processes; ``close`` ends them."""

    def __init__(self, servers: list[Managed], config: ServersConfig) -> None:
        """Start every server and the thread that watches them.

        Args:
            servers: of this node.
            config: deadlines and ``max_restarts``.
        """
        self._servers, self._config = servers, config
        self._num_taken = 0
        self._failure: UserError | None = None
        self._is_busy = threading.Event()
        self._asking = threading.Lock()
        self._stop = threading.Event()
        # The thread starts the servers: the kernel ends a child when the *thread* that started it ends.
        self._thread = threading.Thread(target=self._run, name="server-supervisor", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> UserError | None:
        """The error of a server that cannot be started any more, or None."""
        return self._failure

    def take_restarts(self) -> int:
        """Return the number of restarts on this node since the last call."""
        total = sum(server.num_restarts for server in self._servers)
        taken, self._num_taken = total - self._num_taken, total
        return taken

    def set_busy(self, is_busy: bool) -> None:
        """Switch health checks off while servers load weights or have released their memory; silence is no failure then.

        Returns once a running health check is answered.
        """
        if is_busy:
            self._is_busy.set()
            with self._asking:
                pass
        else:
            now = time.monotonic()
            for server in self._servers:
                server.last_sign_s = now
            self._is_busy.clear()

    def close(self) -> None:
        """Kill the servers. Harmless when repeated."""
        self._stop.set()
        self._thread.join()

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        remove_leftovers()  # of a run that was killed with its servers
        try:
            for server in self._servers:
                self._start(server)
            while not self._stop.wait(LOOK_S):
                for server in self._servers:
                    if self._failure is None:
                        self._look(server)
        finally:
            for server in self._servers:
                if server.process is not None:
                    server.process.kill()
            remove_leftovers()

    def _start(self, server: Managed) -> None:
        server.log.parent.mkdir(parents=True, exist_ok=True)
        server.log_start = server.log.stat().st_size if server.log.exists() else 0
        server.process = server.start()
        server.is_up = False
        server.started_s = server.last_sign_s = time.monotonic()

    def _look(self, server: Managed) -> None:
        assert server.process is not None
        status = server.process.status()
        if status is not None:
            self._replace(server, how_it_ended(status, server.log, server.log_start))
            return
        now = time.monotonic()
        if not server.is_up:
            if _answers(f"{server.url}/model_info", timeout_s=2.0):
                server.is_up = server.has_been_up = True
                server.last_sign_s = time.monotonic()
            elif now - server.started_s > self._config.start_timeout_s:
                self._replace(server, "did not answer in time")
            return
        if now - server.last_sign_s < self._config.health_interval_s:
            return
        with self._asking:
            if self._is_busy.is_set():
                return
            is_well = _answers(f"{server.url}/health", timeout_s=self._config.health_timeout_s)
        if is_well:
            server.last_sign_s = time.monotonic()
        elif not self._is_busy.is_set() and time.monotonic() - server.last_sign_s >= self._config.health_timeout_s:
            self._replace(server, f"gave no sign of life for {time.monotonic() - server.last_sign_s:.0f} s")

    def _replace(self, server: Managed, reason: str) -> None:
        assert server.process is not None
        is_alive = server.process.status() is None
        server.process.kill()  # its children too
        server.reasons.append(reason)
        if not server.has_been_up and is_alive:
            self._failure = UserError(
                "rollout.servers.start_timeout_s",
                self._config.start_timeout_s,
                f"{server.name} did not answer within it",
                f"see {server.log}; raise the limit for large models and slow disks",
            )
        elif not server.has_been_up:
            self._failure = UserError(
                "rollout.sglang_cfg",
                server.name,
                f"{server.url} does not start: it {reason}",
                f"see {server.log}; too little memory is cured by a smaller max_total_tokens or mem_fraction_static",
            )
        elif server.num_restarts >= self._config.max_restarts:
            self._failure = UserError(
                "rollout.servers.max_restarts",
                self._config.max_restarts,
                f"{server.name} failed {server.num_restarts + 1} times; the last time it {reason}",
                f"see {server.log}",
            )
        else:
            server.num_restarts += 1
            print(f"{server.name} {reason}; restart {server.num_restarts}", flush=True)
            self._start(server)


def _answers(url: str, *, timeout_s: float) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):  # URLError, HTTPError and time-outs are OSErrors
        return False
