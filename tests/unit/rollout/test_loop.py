"""The event loop beside the rank's own thread."""

from __future__ import annotations

import pytest

from megatron_rl.rollout.sglang.loop import LoopThread


def test_a_closed_loop_refuses_work_instead_of_waiting_for_ever() -> None:
    loop = LoopThread()
    assert loop.call(lambda: 3) == 3
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call(lambda: 3)
