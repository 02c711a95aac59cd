"""The scheduler of growing requests: bounded, longest first, each branch once, and nothing left when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from megatron_rl.errors import UserError
from megatron_rl.rollout.growth import Branch, Key
from megatron_rl.rollout.sglang.dispatch import Dispatch
from megatron_rl.types import Completion, Request

PIECE = Completion(torch.tensor([1]), torch.zeros(1), "length", 0)


class Bounded:
    """A fleet of which only the size counts here."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity


class Watched(Dispatch):
    """Requests take a few turns of the event loop, the number that their prompt says."""

    def __init__(self, capacity: int, *, failing: int | None = None) -> None:
        super().__init__(Bounded(capacity), stop_ids=[])  # type: ignore[arg-type]
        self.started: list[int] = []
        self.homes: list[int] = []
        self.in_flight = self.most_in_flight = 0
        self.failing = failing

    async def _complete(self, request: Request, home: int) -> Completion:
        turns = int(request.prompt_ids[0])
        self.started.append(turns)
        self.homes.append(home)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns == self.failing:
                raise UserError("rollout", turns, "failed", "nothing")
        finally:
            self.in_flight -= 1
        return PIECE


def branch(key: Key, turns: int, tokens_to_come: int) -> Branch:
    return Branch(key, Request(torch.tensor([turns]), 1, 1.0), tokens_to_come)


def nothing(_branch: Branch, _completion: Completion) -> Sequence[Branch]:
    return ()


def test_what_has_most_to_come_goes_first_and_no_more_than_fit() -> None:
    dispatch = Watched(capacity=2)
    seeds = [branch((n,), turns=n, tokens_to_come=to_come) for n, to_come in enumerate((10, 40, 20, 30, 40))]
    grown = asyncio.run(dispatch.grow(seeds, nothing))
    assert dispatch.started == [1, 4, 3, 2, 0]
    assert dispatch.most_in_flight == 2
    assert set(grown) == {(n,) for n in range(5)}


def test_a_child_starts_when_its_parent_is_complete_not_when_its_level_is() -> None:
    dispatch = Watched(capacity=100)

    def expand(parent: Branch, _completion: Completion) -> Sequence[Branch]:
        return [branch((*parent.key, 0), 1, 1)] if len(parent.key) < 4 else ()

    grown = asyncio.run(dispatch.grow([branch((0,), 500, 9), branch((1,), 1, 9)], expand))
    assert list(grown)[:4] == [(1,), (1, 0), (1, 0, 0), (1, 0, 0, 0)], "the short one's whole line, before the long one"
    assert dispatch.homes == [0, 1, 1, 1, 1, 0, 0, 0], "each goes where its prompt has been"


def test_requests_of_a_group_have_one_home_and_the_first_of_each_goes_first() -> None:
    dispatch = Watched(capacity=100)
    requests = [Request(torch.tensor([turns]), 1, 1.0) for turns in range(1, 7)]
    completions = asyncio.run(dispatch.run(requests, group_size=3, num_groups=2))
    assert dispatch.homes == [0, 1, 0, 0, 1, 1] and dispatch.started == [1, 4, 2, 3, 5, 6]
    assert len(completions) == 6 and None not in completions


def test_a_place_that_several_lead_to_is_asked_for_once() -> None:
    dispatch = Watched(capacity=100)

    def expand(parent: Branch, _completion: Completion) -> Sequence[Branch]:
        return [branch((9, 9), 3, 1)] if len(parent.key) == 1 else ()

    grown = asyncio.run(dispatch.grow([branch((n,), n, 1) for n in range(5)], expand))
    assert len(grown) == 6 and dispatch.started.count(3) == 2  # seed 3, and the shared place


def test_one_failure_ends_all() -> None:
    dispatch = Watched(capacity=100, failing=3)
    seeds = [branch((n,), turns, 1) for n, turns in enumerate((1, 3, 100_000, 100_000))]
    with pytest.raises(UserError):
        asyncio.run(dispatch.grow(seeds, nothing))
    assert dispatch.in_flight == 0


def test_home_attracts_until_it_is_much_busier_than_another() -> None:
    from megatron_rl.config.rollout import ServersConfig, WeightSyncConfig
    from megatron_rl.rollout.sglang.fleet import HOME_SLACK, Fleet, Server

    async def chosen() -> list[int]:
        servers = [Server(index, client=None, state="serving") for index in range(3)]  # type: ignore[arg-type]
        fleet = Fleet(servers, ServersConfig(), WeightSyncConfig(), check=lambda _server, _info: None)
        found = [(await fleet.choose(4)).index for _ in range(HOME_SLACK + 3)]
        servers[1].state = "down"
        return [*found, (await fleet.choose(4)).index]

    found = asyncio.run(chosen())
    assert found[: HOME_SLACK + 1] == [1] * (HOME_SLACK + 1)
    assert found[HOME_SLACK + 1 : HOME_SLACK + 3] == [0, 2]
    assert found[-1] != 1
