"""A rank that does not come costs the others ``trainer.timeout_s``, in every group."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel import groups as groups_module
from megatron_rl.parallel.groups import build_groups
from tests.forked import run_ranks


def seconds_until_given_up(name: str) -> float:
    if name == "cpu_group":  # a group of its own only where the default one is not gloo, as on GPUs
        groups_module._is_gloo = lambda: False  # type: ignore[attr-defined]
    groups = build_groups(
        tensor_parallel_size=2 if name == "tp_group" else 1,
        pipeline_parallel_size=2 if name == "pp_group" else 1,
        device=torch.device("cpu"),
        seed=1,
        timeout_s=1.5,
    )
    started = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(6)  # alive, but elsewhere
        return 0.0
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        dist.all_reduce(torch.zeros(1), group=getattr(groups, name))
    return time.monotonic() - started


@pytest.mark.parametrize("name", ["tp_group", "pp_group", "dp_group", "cpu_group"])
def test_the_timeout_reaches_every_group(name: str) -> None:
    waited, _ = run_ranks(seconds_until_given_up, 2, name, timeout_s=30)
    assert 1 < waited < 5
