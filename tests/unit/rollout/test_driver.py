"""Rank 0's news for a meeting: a generation that fails is never told as done, or this rank alone would raise the error."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import ServedModel
from megatron_rl.rollout.sglang.driver import Driver
from tests.policy_case import tiny_config

FAILURE = UserError("rollout.servers.max_retries", 2, "a request failed 3 times", "see the servers' logs")


@pytest.fixture
def driver() -> Iterator[Driver]:
    """A driver of one server that is not there."""
    config = tiny_config(Path("m"), "rollout.engine=sglang")
    driver = Driver(config, ServedModel(None, None, None, ()), ["http://127.0.0.1:9"], [], key=None)  # type: ignore[arg-type]
    yield driver
    driver.close()


@pytest.mark.parametrize("moment", ["stale", "serving"])
def test_an_error_between_two_questions_is_told_with_the_end(
    driver: Driver, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    future: Future[Any] = Future()
    ask = getattr(driver.fleet, moment)

    def ask_while_it_ends() -> Any:
        if not future.done():
            future.set_exception(FAILURE)
        return ask()

    monkeypatch.setattr(driver.fleet, moment, ask_while_it_ends)
    told = driver.verdict(future)
    assert told["error"] == ["rollout.servers.max_retries", 2, "a request failed 3 times", "see the servers' logs"]


def test_a_refusal_of_any_kind_is_returned_for_all_ranks(driver: Driver) -> None:
    async def refuse() -> None:
        raise FAILURE

    assert driver.attempt(refuse()) is FAILURE
