"""A tree grows on while a server is lost: what was under way there is asked for again elsewhere, and nothing comes twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from megatron_rl.config.rollout import ServersConfig, WeightSyncConfig
from megatron_rl.rollout.growth import Branch
from megatron_rl.rollout.sglang.client import Unavailable, _completion
from megatron_rl.rollout.sglang.dispatch import Dispatch
from megatron_rl.rollout.sglang.fleet import Fleet, Server
from megatron_rl.rollout.sglang.versions import adapter_for
from megatron_rl.types import Completion, Request

ADAPTER = adapter_for("0.5.23", "")


class Node:
    """A server's client; after ``lives`` replies the connection breaks, and with it all that is under way."""

    def __init__(self, lives: int) -> None:
        self.url, self.lives = "http://node", lives
        self.asked: Counter[tuple[int, ...]] = Counter()
        self.answered: Counter[tuple[int, ...]] = Counter()

    async def generate(self, request: Request, **_how: Any) -> Completion:
        key = tuple(request.prompt_ids.tolist())
        self.asked[key] += 1
        await asyncio.sleep(0.001)
        if sum(self.answered.values()) >= self.lives:
            raise Unavailable("connection", "broken")
        self.answered[key] += 1
        return Completion(torch.tensor([7]), torch.zeros(1), "length", 0)

    async def weight_version(self, _timeout_s: float) -> str:
        if sum(self.answered.values()) >= self.lives:
            raise Unavailable("connection", "broken")
        return "0"


def test_nodes_of_a_lost_server_are_asked_for_again_and_counted_once() -> None:
    nodes = [Node(lives=10_000), Node(lives=5)]

    def children(key: tuple[int, ...]) -> list[Branch]:
        places = [(*key, n) for n in range(3)]
        return [Branch(place, Request(torch.tensor(place), 1, 1.0), 4 - len(place)) for place in places]

    expanded: Counter[tuple[int, ...]] = Counter()

    def expand(branch: Branch, _completion: Completion) -> Sequence[Branch]:
        expanded[branch.key] += 1
        return children(branch.key) if len(branch.key) < 4 else ()

    async def grow() -> tuple[Any, Fleet]:
        servers = [Server(i, node, state="serving", adapter=ADAPTER) for i, node in enumerate(nodes)]  # type: ignore[arg-type]
        fleet = Fleet(servers, ServersConfig(), WeightSyncConfig(), check=lambda _server, _info: None)
        fleet.version = 0
        dispatch = Dispatch(fleet, stop_ids=[])
        return await dispatch.grow([b for tree in range(4) for b in children((tree,))], expand), fleet

    grown, fleet = asyncio.run(grow())
    assert len(grown) == 4 * (3 + 9 + 27)
    assert set(expanded.values()) == {1} and set(expanded) == set(grown)
    assert fleet.servers[1].state == "down"
    answered = nodes[0].answered + nodes[1].answered
    assert set(answered) == set(grown) and set(answered.values()) == {1}
    lost = nodes[1].asked - nodes[1].answered
    assert lost and all(nodes[0].answered[key] == 1 for key in lost)
    assert fleet.counts["retried_connection"] + fleet.counts["retried_server_lost"] == sum(lost.values())


def test_an_end_just_at_the_limit_is_an_end() -> None:
    """SGLang before 0.5.23 calls it "length"; a tree would go on beyond the end."""

    def told(kind: str, ids: list[int]) -> str:
        meta = {
            "finish_reason": {"type": kind}, "weight_version": "0", "weight_versions": [{"version": "0"}],
            "output_token_logprobs": [(-0.5, token, None) for token in ids], "completion_tokens": len(ids),
        }  # fmt: skip
        request = Request(torch.tensor([1]), 3, 1.0)
        return _completion({"meta_info": meta, "output_ids": ids}, request, ADAPTER, 0, [9]).finish_reason

    assert told("length", [4, 5, 9]) == told("stop", [4, 5, 9]) == told("stop", [4, 9]) == "stop"
    assert told("length", [4, 9, 5]) == "length"
