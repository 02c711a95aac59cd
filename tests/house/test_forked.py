"""The harness that other tests trust: results in order, failures with their rank, nothing left running."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.forked import run_ranks


def test_results_come_in_rank_order() -> None:
    def total(factor: int) -> tuple[int, int]:
        everyone = torch.tensor(factor * (dist.get_rank() + 1))
        dist.all_reduce(everyone)
        return dist.get_rank(), int(everyone)

    assert run_ranks(total, 3, factor=10) == [(0, 60), (1, 60), (2, 60)]


def test_rank_that_is_done_waits_for_the_others() -> None:
    """Its connections must not close while another rank still builds its own; and nothing is a result, too."""

    def return_at_once() -> None: ...

    for _ in range(5):
        assert run_ranks(return_at_once, 4) == [None] * 4


def test_failing_rank_is_named_with_its_traceback() -> None:
    def fail_on_rank_1() -> None:
        if dist.get_rank() == 1:
            raise KeyError("needle")
        dist.barrier()

    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed(.|\n)*fail_on_rank_1(.|\n)*KeyError: 'needle'"):
        run_ranks(fail_on_rank_1, 2)


def test_result_that_cannot_be_sent_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="rank 0 of 1 failed"):
        run_ranks(lambda: lambda: None, 1)


def end_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("end", "how"), [(lambda: os._exit(3), "exit code 3"), (end_by_signal, "signal SIGKILL")])
def test_rank_that_dies_is_named(end: Callable[[], None], how: str) -> None:
    with pytest.raises(AssertionError, match=f"died without a result, of 2 ranks: rank 1 by {how}"):
        run_ranks(lambda: end() if dist.get_rank() == 1 else time.sleep(60), 2)


def is_gone(pid: int) -> bool:
    """Ended, or ended and not yet collected by whoever inherited it."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_time_limit_names_who_is_running_and_leaves_nobody(tmp_path: Path) -> None:
    def fork_and_sleep() -> None:
        if dist.get_rank() == 1:
            return
        os.fork()
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    with pytest.raises(
        AssertionError,
        match=r"ranks \[0, 2\] of 3 were still running after 4 s, here:\nrank 0:(.|\n)* in fork_and_sleep",
    ):
        run_ranks(fork_and_sleep, 3, timeout_s=4)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 4
    time.sleep(0.1)  # a killed process takes a moment to disappear
    assert all(map(is_gone, pids))
