"""The server processes of one node: started, watched, restarted and stopped by the node's first rank.

Threads do this, because restarts must go on while the rank trains or waits in a collective. It knows processes, not
weights: a restarted server comes back with random weights (``load_format: dummy``), its stamp says so, and rank 0
(fleet.py) has the current weights delivered before it serves.

A server on the trainer's GPUs fixes the size of its cache by the memory that is free while it starts, so starts have a gate:

    trainer has the memory    gate closed   a server that ends stays down
    trainer has released it   gate open     what is down starts

A server over several nodes is a process on each. They end and start together: each supervisor counts the starts of its part,
and replaces one that fell behind those of the other nodes (engine.py compares). Behind a closed gate a part whose other part is
down is ended and stays down too: it would wait for it, or keep the memory that the trainer needs.
"""

from __future__ import annotations

import re
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.config.installed import platform
from megatron_rl.config.rollout import ServersConfig
from megatron_rl.errors import UserError, described
from megatron_rl.process import heartbeat
from megatron_rl.process.child import ChildProcess, how_it_ended
from megatron_rl.process.heartbeat import Heartbeats
from megatron_rl.rollout.sglang.leftovers import remove_leftovers

LOOK_S = 0.5
KILLED_STARTS = 2
"""Further starts of a server that was killed before it had ever answered."""
CHILD_KILLED = "exit code: -"
"""Words of SGLang about a process of its own that a signal has ended."""
SCHEDULER_ANSWERS = "/server_info"
"""A question that the scheduler answers, also while generation is paused. That for ``/health`` generates a token, which a
server that is asked for its memory does not survive."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks without a proxy of the environment, which would learn the key."""


@dataclass
class Managed:
    """One server of this node."""

    name: str
    url: str
    log: Path
    start: Callable[[Mapping[str, str]], ChildProcess]
    """Starts it, with further environment variables."""
    is_answering: bool = True
    """False for a part of a larger server, on another node than its first: what it answers speaks for its process alone."""
    process: ChildProcess | None = None
    """None before its first start, and from an end behind a closed gate to the next start."""
    heartbeats: Heartbeats = field(default_factory=Heartbeats)
    has_been_up: bool = False
    """True once it has answered since the run began."""
    is_up: bool = False
    """True once it has answered since its last start."""
    started_s: float = 0.0
    silent_s: float = 0.0
    """Seconds without an answer while it should give one."""
    log_start: int = 0
    """Size of the log before the last start, in bytes."""
    num_starts: int = 0
    num_starts_elsewhere: int = 0
    """The most starts of another part of the same server."""
    lacks_part: bool = False
    """True if another part of the same server was down when the nodes last compared."""
    num_restarts: int = 0
    reasons: list[str] = field(default_factory=list)


class Supervisor:
    """Owner of the server processes; ``close`` ends them.

    Two signs of life count. An answer from the scheduler shows that it works, but it gives none while weights are loading or
    its memory is released. A heartbeat of each process (process/heartbeat.py) shows less, and is due in every phase.
    """

    def __init__(self, servers: list[Managed], config: ServersConfig, *, key: str, may_start: bool = True) -> None:
        """Start the threads that start and watch every server.

        Args:
            servers: of this node.
            config: deadlines and ``max_restarts``.
            key: of the servers.
            may_start: False keeps the gate closed until ``allow_starts``.
        """
        self._servers, self._config, self._key = servers, config, key
        self._num_taken = 0
        self._failure: UserError | None = None
        self._is_busy = threading.Event()
        self._may_start = may_start
        self._gate = threading.Lock()
        """Held while a server starts, so that none is half started when the gate closes."""
        self._stop = threading.Event()
        # One thread starts all servers: the kernel ends a child when the *thread* that started it ends. It never waits for an
        # answer; that is for the others.
        self._threads = [threading.Thread(target=self._run, name="server-supervisor", daemon=True)]
        self._threads += [threading.Thread(target=self._ask, args=(server,), daemon=True) for server in servers]
        for thread in self._threads:
            thread.start()

    @property
    def failure(self) -> UserError | None:
        """The error of a server that cannot be started any more, or None."""
        return self._failure

    def take_restarts(self) -> int:
        """Return the number of restarts on this node since the last call."""
        total = sum(server.num_restarts for server in self._servers if server.is_answering)
        taken, self._num_taken = total - self._num_taken, total
        return taken

    def set_busy(self, is_busy: bool) -> None:
        """Say that servers load weights or have released their memory: answers are not due then, heartbeats are."""
        if is_busy:
            self._is_busy.set()
        else:
            self._is_busy.clear()

    def allow_starts(self) -> None:
        """Open the gate: servers that are down start."""
        with self._gate:
            self._may_start = True

    def hold_starts(self) -> None:
        """Close the gate: from now on no server starts. One that is starting goes on; ``running`` has it."""
        with self._gate:
            self._may_start = False
            for server in self._servers:
                server.lacks_part = False  # known anew after the next comparison

    def running(self) -> dict[str, bool]:
        """Return the URL of every server with a process, and whether it has answered since that was started."""
        with self._gate:
            servers = [server for server in self._servers if server.is_answering]
            return {server.url: server.is_up for server in servers if server.process is not None}

    def starts(self) -> dict[str, int]:
        """Return how often each server of this node, or its part of one, was started; if it is down, with its next start."""
        with self._gate:
            return {server.name: server.num_starts + (server.process is None) for server in self._servers}

    def down(self) -> list[str]:
        """Return the names of the servers of this node without a process."""
        with self._gate:
            return [server.name for server in self._servers if server.process is None]

    def follow(self, starts: Mapping[str, int], down: Collection[str] = ()) -> None:
        """Start anew whatever has other parts that were started more often; behind a closed gate end what has one that is down.

        Args:
            starts: by name, the most that a node has.
            down: names of servers that some node has no process of.
        """
        for server in self._servers:
            server.num_starts_elsewhere = max(server.num_starts_elsewhere, starts.get(server.name, 0))
            server.lacks_part = server.name in down

    def has_halves(self) -> bool:
        """Return whether a part of this node that has lost another still runs. It is ended soon."""
        return any(server.process is not None and self._has_lost_part(server) for server in self._servers)

    def _has_lost_part(self, server: Managed) -> bool:
        return server.num_starts < server.num_starts_elsewhere or (server.lacks_part and not self._may_start)

    def close(self) -> None:
        """Kill the servers. Harmless when repeated."""
        self._stop.set()
        self._threads[0].join()
        for server in self._servers:
            server.heartbeats.close()

    # ------------------------------------------------------------------------------------------------ the threads

    def _ask(self, server: Managed) -> None:
        while not self._stop.wait(self._config.health_interval_s if server.is_up else LOOK_S):
            if not server.is_up:
                path = "/model_info" if server.is_answering else "/health"
                if server.process is not None and self._answers(f"{server.url}{path}", timeout_s=2.0):
                    server.is_up = server.has_been_up = True
                    server.silent_s = 0.0
            elif not server.is_answering or (
                not self._is_busy.is_set()
                and self._answers(f"{server.url}{SCHEDULER_ANSWERS}", timeout_s=self._config.health_timeout_s)
            ):  # its first part answers for it, its processes have heartbeats
                server.silent_s = 0.0

    def _run(self) -> None:
        remove_leftovers()  # of a run that was killed with its servers
        try:
            self._watch()
        except (
            Exception
        ) as error:  # a thread's error reaches nobody, and the run would wait for servers that never come
            traceback.print_exc()
            self._failure = UserError(
                "rollout.servers",
                ", ".join(server.name for server in self._servers),
                f"can be watched no more: {described(error)}",
                "see the traceback in this rank's log",
            )
        finally:
            for server in self._servers:
                if server.process is not None:
                    server.process.kill()
            remove_leftovers()

    def _watch(self) -> None:
        looked_s = time.monotonic()
        while True:
            now = time.monotonic()
            # Less than has passed where this process itself was stopped, or the machine gave it no time.
            passed_s, looked_s = min(now - looked_s, 3 * LOOK_S), now
            for server in self._servers:
                if self._failure is None and server.process is None:
                    self._start(server)
                elif self._failure is None:
                    self._look(server, passed_s)
            if self._stop.wait(LOOK_S):
                return

    def _start(self, server: Managed) -> None:
        """Start a server if the gate is open."""
        with self._gate:
            if not self._may_start:
                return
            server.log.parent.mkdir(parents=True, exist_ok=True)
            server.log_start = server.log.stat().st_size if server.log.exists() else 0
            server.heartbeats.forget()
            server.process = server.start({heartbeat.VARIABLE: str(server.heartbeats.folder)})
            server.is_up, server.silent_s, server.started_s = False, 0.0, time.monotonic()
            server.num_starts = max(server.num_starts + 1, server.num_starts_elsewhere)

    def _look(self, server: Managed, passed_s: float) -> None:
        assert server.process is not None
        limit_s = self._config.health_timeout_s
        status = server.process.status()
        if status is not None:
            self._replace(server, how_it_ended(status, server.log, server.log_start))
        elif self._has_lost_part(server):
            self._replace(server, "has lost its part on another node", is_hopeless=False)
        elif not server.is_up:  # its imports may hold the interpreter's lock for long
            if time.monotonic() - server.started_s > self._config.start_timeout_s:
                self._replace(server, "did not answer in time")
        else:
            # After a weight update an answer is due health_timeout_s later, whatever went before.
            server.silent_s = 0.0 if self._is_busy.is_set() else server.silent_s + passed_s
            frozen_s = server.heartbeats.silence_s(passed_s)
            if max(server.silent_s, frozen_s) >= limit_s:
                self._replace(server, f"gave no sign of life for {max(server.silent_s, frozen_s):.0f} s")

    def _replace(self, server: Managed, reason: str, *, is_hopeless: bool | None = None) -> None:
        assert server.process is not None
        status = server.process.status()
        server.process.kill()  # its children too
        server.process, server.is_up = None, False
        server.reasons.append(reason)
        # Its own error would come again; a signal came from outside, maybe for want of memory, and may not.
        was_killed = status is not None and (status < 0 or CHILD_KILLED in reason)
        if is_hopeless is None:
            is_hopeless = not server.has_been_up and (not was_killed or server.num_restarts >= KILLED_STARTS)
        if is_hopeless and status is None:
            self._failure = UserError(
                "rollout.servers.start_timeout_s",
                self._config.start_timeout_s,
                f"{server.name} did not answer within it",
                f"see {server.log}; raise the limit for large models, slow disks and first compilations",
            )
        elif is_hopeless:
            self._failure = does_not_start(server.name, server.url, server.log, reason, platform())
        elif server.num_restarts >= self._config.max_restarts:
            self._failure = UserError(
                "rollout.servers.max_restarts",
                self._config.max_restarts,
                f"{server.name} failed {server.num_restarts + 1} times; the last time it {reason}",
                f"see {server.log}",
            )
        else:
            server.num_restarts += 1
            when = "" if self._may_start else ", once the trainer has released its memory"
            print(f"{server.name} {reason}; restart {server.num_restarts}{when}", flush=True)
            self._start(server)

    def _answers(self, url: str, *, timeout_s: float) -> bool:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self._key}"})
        try:
            with _DIRECT.open(request, timeout=timeout_s) as response:
                return bool(response.status == 200)
        except (OSError, ValueError):  # URLError, HTTPError and time-outs are OSErrors
            return False


def does_not_start(name: str, url: str, log: Path, reason: str, platform: str) -> UserError:
    """Say what a user can do about a server that ended before it had ever answered.

    Args:
        name: of the server.
        url: its address.
        log: its log file.
        reason: how it ended, with the last error of its log.
        platform: Makefile's PLATFORM for this machine.
    """
    if missing := re.search(r"ModuleNotFoundError: No module named '([^']+)'", reason):
        rule = f"needs the package {missing[1]}, which is not installed here ({name} does not start)"
        fix = f"make sglang PLATFORM={platform} installs all that a server imports; see {log}"
    elif "ImportError:" in reason:
        rule = f"cannot be imported: {name} {reason}"
        fix = f"install versions that go together: make clean, then make sglang PLATFORM={platform}; see {log}"
    else:
        rule = f"{url} does not start: it {reason}"
        fix = f"see {log}; too little memory is cured by a smaller max_total_tokens or mem_fraction_static"
        return UserError("rollout.sglang_cfg", name, rule, fix)
    return UserError("rollout.engine", "sglang", rule, fix)
