"""The folder of presampling: what is done, what a kill leaves, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_rl.data.pool import Pool, PoolWriter, Provenance, Trajectory
from megatron_rl.data.presampled import EXPLORATION, KEPT, PresampledFolder, Verdict
from megatron_rl.errors import UserError
from megatron_rl.types import Problem

ORIGIN = Provenance("t", "m", "k")
SETTINGS = {"num_samples": 2, "seed": 1}


def trajectory(number: int) -> Trajectory:
    return Trajectory(f"p{number}", torch.tensor([number]), torch.tensor([number, 9]), 1.0)


def problems(path: Path) -> list[Problem]:
    path.write_text("".join(json.dumps({"question": f"q{n}", "other": "kept as it is"}) + "\n" for n in range(4)))
    return [Problem(f"p{n}", f"q{n}", "1", source=f"{path}:{n + 1}") for n in range(4)]


def test_chunks_are_kept_and_summed_up(tmp_path: Path) -> None:
    folder = PresampledFolder(tmp_path / "out", SETTINGS, ORIGIN)
    assert folder.num_done() == 0
    folder.keep(0, [Verdict("p0", 2, KEPT), Verdict("p1", 0, EXPLORATION)], [trajectory(0)])
    folder.keep(1, [Verdict("p2", 1, EXPLORATION), Verdict("p3", 2, "dropped: wrong")], [])
    assert PresampledFolder(tmp_path / "out", SETTINGS, ORIGIN).num_done() == 2
    rows = problems(tmp_path / "all.jsonl")
    summary = folder.finish(rows, [str(tmp_path / "all.jsonl")], 2)
    assert summary["fates"] == {KEPT: 1, EXPLORATION: 2, "dropped: wrong": 1}
    assert summary["problems_by_num_correct"] == [1, 1, 2]
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert folder.exploration.read_text().splitlines() == [lines[1], lines[2]]


def test_a_shard_without_its_record_is_sampled_again(tmp_path: Path) -> None:
    folder = PresampledFolder(tmp_path, SETTINGS, ORIGIN)
    folder.keep(0, [Verdict("p0", 2, KEPT)], [trajectory(0)])
    folder.keep(1, [Verdict("p1", 2, KEPT)], [trajectory(1)])
    (tmp_path / "chunks" / "000001.json").unlink()  # killed between the two writes
    again = PresampledFolder(tmp_path, SETTINGS, ORIGIN)
    assert again.num_done() == 1
    assert [row.problem_id for row in Pool(again.pool)] == ["p0"]
    again.keep(1, [Verdict("p1", 2, KEPT)], [trajectory(1)])
    assert [row.problem_id for row in Pool(again.pool)] == ["p0", "p1"]


def test_other_settings_and_other_pools_are_refused(tmp_path: Path) -> None:
    PresampledFolder(tmp_path / "begun", SETTINGS, ORIGIN)
    with pytest.raises(UserError, match="was begun with other settings: seed"):
        PresampledFolder(tmp_path / "begun", SETTINGS | {"seed": 2}, ORIGIN)
    with PoolWriter(tmp_path / "built" / "pool", ORIGIN) as writer:
        writer.add(trajectory(0))
    with pytest.raises(UserError, match="holds a pool that was not begun here"):
        PresampledFolder(tmp_path / "built", SETTINGS, ORIGIN)
    assert len(Pool(tmp_path / "built" / "pool")) == 1
