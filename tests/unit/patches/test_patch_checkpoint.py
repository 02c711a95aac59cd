"""A save starts no process, and when one rank cannot write, all ranks hear of it."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from tests.forked import run_ranks

ROWS = 4096


def shard(fill: float) -> dict[str, ShardedTensor]:
    rows = torch.full((ROWS, 4), fill)
    return {"weight": ShardedTensor.from_rank_offsets("weight", rows, (0, dist.get_rank(), dist.get_world_size()))}


def save_and_load(directory: Path) -> tuple[int, float]:
    dist_checkpointing.save(shard(1.0 + dist.get_rank()), str(directory))
    num_children = len(psutil.Process().children(recursive=True))
    return num_children, dist_checkpointing.load(shard(0.0), str(directory))["weight"].mean().item()


def test_save_leaves_no_process(tmp_path: Path) -> None:
    assert run_ranks(save_and_load, 2, tmp_path) == [(0, 1.0), (0, 2.0)]


def fail_then_save(directory: Path) -> tuple[str, float, float]:
    """Rank 1 may not write files as large as its shard; afterwards it may."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROWS, limits[1]))
    started_s = time.monotonic()
    try:
        dist_checkpointing.save(shard(1.0), str(directory / "full"))
        error = ""
    except CheckpointException as caught:  # a BaseException: ``except Exception`` would miss it
        error = type(caught).__name__
    took_s = time.monotonic() - started_s
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _, mean = save_and_load(directory / "again")
    return error, took_s, mean


def test_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "again").mkdir()
    for rank, (error, took_s, mean) in enumerate(run_ranks(fail_then_save, 2, tmp_path, timeout_s=20)):
        assert error == "CheckpointException"
        assert took_s < 10
        assert mean == pytest.approx(1.0 + rank)
    assert not (tmp_path / "full" / "metadata.json").exists()  # by which a reader tells a whole checkpoint
