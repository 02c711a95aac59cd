"""Rank 0's side of the engine: the event loop, and the fleet and dispatch that live in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import aiohttp
import torch.distributed as dist

from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import ARCHITECTURES, read_shape
from megatron_rl.errors import UserError
from megatron_rl.parallel.agree import broadcast_json, error_to_json, raise_first
from megatron_rl.process import activity
from megatron_rl.rollout.engine import ServedModel
from megatron_rl.rollout.sglang.client import Refused, SGLangClient
from megatron_rl.rollout.sglang.dispatch import Dispatch
from megatron_rl.rollout.sglang.fleet import Fleet, Server
from megatron_rl.rollout.sglang.loop import LoopThread

MEET_S = 1.0
"""Seconds between two meetings of the ranks while the servers work."""
IDLE_CONNECTION_S = 2.0
"""Idle connections are closed after this. A server hangs up after 5 s without a request; a connection that it has just closed
costs a retry, and in a weight update the server's place, so ours are closed well before."""


def open_session() -> aiohttp.ClientSession:
    """Open the HTTP session for all servers. It sets no limits: the fleet bounds requests in flight, each has a deadline."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


class Driver:
    """Rank 0's side of the engine: the event loop and what lives in it. The rank's main thread calls its methods."""

    def __init__(
        self, config: Config, model: ServedModel, urls: Sequence[str], logs: Sequence[str], *, key: str | None
    ) -> None:
        self._config, self._model = config, model
        self.loop = LoopThread()
        self.fleet, self.dispatch = self.loop.run(self._build(urls, logs, key))

    async def _build(self, urls: Sequence[str], logs: Sequence[str], key: str | None) -> tuple[Fleet, Dispatch]:
        self._session = open_session()
        servers = [
            Server(index, SGLangClient(url, self._session, key=key), Path(logs[index]) if logs else None)
            for index, url in enumerate(urls)
        ]
        fleet = Fleet(servers, self._config.rollout.servers, self._config.weight_sync, check=self._check)
        fleet.start()
        return fleet, Dispatch(fleet, stop_ids=self._model.stop_ids, experts=self._model.experts)

    def _check(self, server: Server, info: dict[str, Any]) -> None:
        shape, architectures = self._model.shape, info.get("architectures")
        if architectures != [ARCHITECTURES[shape.family]]:
            raise UserError(
                "rollout.servers.urls",
                server.client.url,
                f"serves {architectures}, the policy is a {ARCHITECTURES[shape.family]}",
                "start the server with the model of policy.model_path",
            )
        # If the server's folder cannot be read here, a model of another size is found when it refuses the weights.
        folder = Path(str(info.get("model_path")))
        if (folder / "config.json").is_file() and read_shape(folder) != shape:
            raise UserError(
                "rollout.servers.urls",
                server.client.url,
                f"serves another model ({folder}) than policy.model_path ({self._model.path})",
                "start the server with the model of policy.model_path",
            )
        if self._model.records_experts and not info.get("enable_return_routed_experts"):
            raise UserError(
                "rollout.servers.urls",
                server.client.url,
                "does not say which experts it chose, which policy.router_replay needs",
                "start the server with --enable-return-routed-experts",
            )
        dtype = str(self._model.dtype).removeprefix("torch.")
        if self._config.rollout.servers.urls is not None and info.get("dtype") != dtype:
            raise UserError(
                "rollout.servers.urls",
                server.client.url,
                f"computes in {info.get('dtype')}, the policy in {dtype}",
                f"start the server with --dtype {dtype}",
            )

    def verdict(self, future: Future[Any] | None) -> dict[str, Any]:
        """Return rank 0's news for a meeting, after waiting up to ``MEET_S`` for some."""
        deadline = time.monotonic() + MEET_S
        while True:
            error = self.fleet.failure
            # Asked once: a future that ends in an error between two questions would be done without one, and this rank
            # alone would raise it.
            has_ended = future is not None and future.done()
            if future is not None and has_ended and (failure := future.exception()) is not None:
                if not isinstance(failure, UserError):
                    raise RuntimeError("generation failed") from failure
                error = error or failure
            stale = [server.index for server in self.loop.call(self.fleet.stale)]
            is_serving = bool(self.loop.call(self.fleet.serving))
            is_done = has_ended if future is not None else is_serving and not self._is_one_still_starting()
            if error or stale or is_done or time.monotonic() > deadline:
                state = "wait" if not is_done else "done" if future is not None else "serving"
                return {"error": error_to_json(error), "stale": stale, "state": state}
            if future is not None:
                wait([future], timeout=0.1)
            else:
                time.sleep(0.1)

    def wait_for_answers(self, running: Mapping[str, bool]) -> tuple[bool, list[Any] | None]:
        """Wait up to ``MEET_S`` for servers that are starting.

        Args:
            running: URL of each server with a process; True if that has answered.

        Returns:
            Whether the fleet has an answer of all of them, and the error that ends the run, if any.
        """
        deadline = time.monotonic() + MEET_S
        while True:
            is_done, error = self.loop.call(lambda: self.fleet.has_answer_of(running)), self.fleet.failure
            if error or time.monotonic() > deadline or (is_done and all(running.values())):
                return is_done, error_to_json(error)
            time.sleep(0.1)

    def _is_one_still_starting(self) -> bool:
        """Check whether a server has never answered: a run that began with only some servers would hide a mistake."""
        return not all(server.is_known for server in self.fleet.servers)

    def attempt(self, work: Coroutine[Any, Any, None], what: str = "a weight update") -> UserError | None:
        """Run a coroutine of the fleet to its end; a server's refusal is returned."""
        return self.outcome(self.loop.submit(work), what)

    def outcome(self, future: Future[None], what: str) -> UserError | None:
        """Wait for a coroutine of the fleet; an error is returned, for all ranks to raise."""
        try:
            future.result()
        except UserError as error:
            return error
        except Refused as error:
            return UserError(
                "rollout.engine",
                "sglang",
                f"{what} was refused ({error})",
                "see the server's log; the server must serve the model of policy.model_path",
            )
        return None

    def take_counts(self) -> dict[str, int]:
        """Return the counts of mended failures since the last call."""

        def take() -> dict[str, int]:
            counts = dict(self.fleet.counts)
            self.fleet.counts.clear()
            return counts

        return self.loop.call(take)

    def take_cached_share(self) -> float | None:
        """Return the share of prompt tokens since the last call that a prefix cache had; None without any."""

        def take() -> float | None:
            clients = [server.client for server in self.fleet.servers]
            num_tokens = sum(client.num_prompt_tokens for client in clients)
            num_cached = sum(client.num_cached_tokens for client in clients)
            for client in clients:
                client.num_prompt_tokens = client.num_cached_tokens = 0
            return num_cached / num_tokens if num_tokens else None

        return self.loop.call(take)

    def close(self) -> None:
        """Stop the loop. Safe to call twice."""
        if self.loop.is_running:
            self.loop.run(self.fleet.stop())
            self.loop.run(self._session.close())
            self.loop.close()


def together(
    driver: Driver | None,
    work: Callable[[Driver], Coroutine[Any, Any, None]],
    cpu_group: dist.ProcessGroup,
    *,
    what: str = "a weight update",
) -> None:
    """Run a coroutine of rank 0's fleet and wait for it on all ranks, which meet meanwhile; a collective.

    Args:
        driver: on rank 0; None on other ranks.
        work: makes the coroutine.
        cpu_group: all ranks, over gloo.
        what: names the request in the error.

    Raises:
        UserError: on all ranks; a server refused.
    """
    future = driver.loop.submit(work(driver)) if driver is not None else None
    while not broadcast_json(bool(future and wait([future], timeout=MEET_S).done), cpu_group):
        activity.beat()  # each request has a deadline
    error = driver.outcome(future, what) if driver is not None and future is not None else None
    raise_first([broadcast_json(error_to_json(error), cpu_group)])
