"""GPUs that do not reach each other are named at the start; here over gloo, whose ranks stand for nodes."""

from __future__ import annotations

import socket
import time

import pytest
import torch

from megatron_rl.errors import UserError
from megatron_rl.launch import reach
from tests.forked import run_ranks


def check(num_nodes: int, silent: int | None, broken: int | None) -> str | None:
    """Return the error that a rank hears where one of them never answers, or fails."""
    rank, exchange = torch.distributed.get_rank(), reach._exchange
    socket.gethostname = lambda: f"node-{rank // (4 // num_nodes)}"  # type: ignore[assignment]

    def spoilt(group: torch.distributed.ProcessGroup, device: torch.device) -> None:
        others = torch.distributed.get_process_group_ranks(group)
        is_between_nodes = num_nodes == 1 or others[1] - others[0] > 1 or num_nodes == 4
        if rank == silent and is_between_nodes:
            time.sleep(30)
        if rank == broken and is_between_nodes:
            raise RuntimeError("unhandled system error")
        exchange(group, device)

    reach._exchange = spoilt
    try:
        reach.check_ranks_reach_each_other(
            num_nodes=num_nodes, devices=4 // num_nodes, device=torch.device("cpu"), limit_s=1.5, backend="gloo"
        )
    except UserError as error:
        return str(error)
    return None


def test_the_limit_is_below_those_after_which_others_end_without_a_word() -> None:
    assert reach.limit_below(1800.0, 900.0) == reach.limit_below(1800.0, None) == reach.LIMIT_S
    assert reach.limit_below(60.0, 900.0) == 40.0 and reach.limit_below(1800.0, 90.0) == 60.0


@pytest.mark.parametrize("num_nodes", [1, 2, 4])
def test_ranks_that_reach_each_other(num_nodes: int) -> None:
    assert run_ranks(check, 4, num_nodes, None, None) == [None] * 4


@pytest.mark.parametrize(
    ("num_nodes", "silent", "broken", "expected"),
    [
        (
            2,
            2,
            None,
            "NCCL: does not connect node-0 (rank 0) and node-1 (rank 2): no answer within 1.5 s. Fix: name the",
        ),
        (4, 3, None, "node-2 (rank 2) and node-3 (rank 3): no answer within 1.5 s"),
        (4, None, 2, "node-2 (rank 2) and node-3 (rank 3): RuntimeError: unhandled system error"),
        (
            1,
            None,
            1,
            "does not connect the GPUs of node-0: RuntimeError: unhandled system error. Fix: give a container more",
        ),
    ],
)
def test_who_does_not_is_named_on_all_ranks(
    num_nodes: int, silent: int | None, broken: int | None, expected: str
) -> None:
    heard = run_ranks(check, 4, num_nodes, silent, broken)
    assert len(set(heard)) == 1 and expected in str(heard[0]), heard
