"""Rollouts that cannot be recorded end the run with a reason, on all ranks."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist

from megatron_rl.errors import UserError
from megatron_rl.parallel.agree import all_ranks_agree
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.recorded import RecordedEngine, RecordingEngine
from megatron_rl.types import Completion, Request
from tests.forked import run_ranks


class OneCompletion:
    """An engine that always says the same."""

    def generate(self, requests, **_how):
        return [Completion(torch.tensor([1]), torch.zeros(1), "stop", 0) for _ in requests]


def requests() -> list[Request]:
    return [Request(torch.tensor([1, 2]), 4, 1.0, 1.0, 0, seed=0)]


def failure_of(directory: Path) -> str | None:
    group = dist.group.WORLD
    assert group is not None
    engine = RecordingEngine(
        cast(RolloutEngine, OneCompletion()),
        directory,
        is_writer=dist.get_rank() == 0,
        agree=lambda: all_ranks_agree(group),
    )
    try:
        engine.generate(requests())
    except UserError as error:
        return str(error)
    return None


def test_a_record_that_cannot_be_written_ends_all_ranks_with_one_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = run_ranks(failure_of, 2, tmp_path / "file/rollouts")
    assert first == second and first is not None and "rollout.record = " in first and "could not be written" in first


def test_a_full_disk_leaves_no_half_record(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    engine = RecordingEngine(cast(RolloutEngine, OneCompletion()), tmp_path, is_writer=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(UserError, match="could not be written"):
            engine.generate(requests())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    engine.generate(requests())
    assert RecordedEngine(tmp_path).generate(requests())[0] is not None
