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
from megatron_rl.rollout.growth import Branch, Expand, grow_by_level
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


def test_a_growth_is_recorded_with_all_that_was_asked(tmp_path: Path) -> None:
    """The same seeds and as many branches, but continued from another place: refused, not attached to other prefixes."""

    def expand_after(num_tokens: int) -> Expand:
        def expand(branch: Branch, completion: Completion) -> list[Branch]:
            if len(branch.key) > 1:
                return []
            prefix = torch.cat([branch.request.prompt_ids, completion.response_ids[:num_tokens]])
            return [Branch((*branch.key, 0), Request(prefix, 4, 1.0), 4)]

        return expand

    class Growing:
        weight_version = 0

        def grow(self, seeds, expand):  # type: ignore[no-untyped-def]
            def generate(requests):  # type: ignore[no-untyped-def]
                return [Completion(r.prompt_ids + 1, torch.zeros(len(r.prompt_ids)), "stop", 0) for r in requests]

            return grow_by_level(seeds, expand, generate)

    seeds = [Branch((n,), Request(torch.tensor([n, n + 1, n + 2]), 4, 1.0), 4) for n in range(3)]
    recording = RecordingEngine(Growing(), tmp_path, is_writer=True)  # type: ignore[arg-type]
    grown = recording.grow(seeds, expand_after(2))
    replayed = RecordedEngine(tmp_path).grow(seeds, expand_after(2))
    assert list(replayed) == list(grown)
    assert all(torch.equal(replayed[key].response_ids, grown[key].response_ids) for key in grown)
    with pytest.raises(UserError, match="continue other prefixes"):
        RecordedEngine(tmp_path).grow(seeds, expand_after(1))
    with pytest.raises(UserError, match=r"surplus|do not grow"):
        RecordedEngine(tmp_path).grow(seeds, lambda _branch, _completion: [])
    with pytest.raises(UserError, match="no record"):
        RecordedEngine(tmp_path).grow(seeds[:2], expand_after(2))
