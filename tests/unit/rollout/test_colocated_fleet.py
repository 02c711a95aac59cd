"""Rank 0's view of colocated servers: while the trainer has their memory, one that is down is not overdue."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from megatron_rl.config.rollout import ServersConfig, WeightSyncConfig
from megatron_rl.rollout.sglang import fleet
from megatron_rl.rollout.sglang.client import Unavailable
from megatron_rl.rollout.sglang.fleet import Fleet, Server
from megatron_rl.rollout.sglang.versions import adapter_for

ADAPTER = adapter_for("0.5.23", "")
START_S = 0.4


@pytest.fixture(autouse=True)
def _ask_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "POLL_S", 0.02)


class Client:
    """Answers while it lives."""

    def __init__(self) -> None:
        self.url, self.lives = "http://server", True
        self.asked: Counter[str] = Counter()

    def _answer(self, what: str) -> None:
        self.asked[what] += 1
        if not self.lives:
            raise Unavailable("connection", "refused")

    async def release_memory(self, _timeout_s: float) -> None:
        self._answer("release")

    async def resume_memory(self, _timeout_s: float) -> None:
        self._answer("resume")

    async def info(self, _timeout_s: float) -> dict[str, Any]:
        self._answer("info")
        return {"weight_version": "none"}


def fleet_of(client: Client) -> Fleet:
    server = Server(0, client, state="serving", adapter=ADAPTER, is_known=True)  # type: ignore[arg-type]
    config = ServersConfig(start_timeout_s=START_S)
    return Fleet([server], config, WeightSyncConfig(), check=lambda _server, _info: None)


def test_a_death_in_a_long_update_leaves_the_whole_time_for_the_start_after_it() -> None:
    client = Client()

    async def update() -> Fleet:
        watched = fleet_of(client)
        watched.start()
        await watched.release_memory()
        client.lives = False
        await watched.mark_down(watched.servers[0], "died")
        await asyncio.sleep(4 * START_S)
        assert watched.failure is None, "nothing can start now"
        await watched.resume_memory()
        await asyncio.sleep(START_S / 4)
        assert watched.failure is None, "its time has just begun"
        client.lives = True
        async with asyncio.timeout(10):
            while not watched.stale():
                await asyncio.sleep(0.05)
        await watched.stop()
        return watched

    assert asyncio.run(update()).failure is None


def test_one_that_does_not_come_up_behind_the_open_gate_ends_the_run() -> None:
    client = Client()

    async def update() -> Fleet:
        watched = fleet_of(client)
        watched.start()
        await watched.release_memory()
        client.lives = False
        await watched.resume_memory()  # finds out that it is gone
        assert watched.servers[0].state == "down" and watched.failure is None
        async with asyncio.timeout(10):
            while watched.failure is None:
                await asyncio.sleep(0.05)
        await watched.stop()
        return watched

    assert "no server answered" in str(asyncio.run(update()).failure)


def test_memory_that_is_released_is_not_released_again() -> None:
    client = Client()

    async def twice() -> None:
        watched = fleet_of(client)
        assert watched.has_answer_of(["http://server"])
        for _ in range(2):
            await watched.release_memory()
        await watched.resume_memory()
        await watched.mark_down(watched.servers[0], "died")
        assert not watched.has_answer_of(["http://server"]) and watched.has_answer_of([])

    asyncio.run(twice())
    assert client.asked == {"release": 1, "resume": 1}
