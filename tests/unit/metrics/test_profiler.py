"""Profiles of chosen steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_rl.config.trainer import ProfileConfig
from megatron_rl.metrics.profiler import StepProfiler


def run(profiler: StepProfiler, *, fails_in: int = 0) -> None:
    for step in range(1, 5):
        with profiler.step(step):
            torch.mm(torch.ones(8, 8), torch.ones(8, 8))
            if step == fails_in:
                raise RuntimeError("the step failed")


def test_a_trace_and_a_table_of_each_chosen_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(StepProfiler(ProfileConfig(steps=[2, 4], ranks=[0, 3]), tmp_path / "profile", 3))
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == [f"step_0000000{step}_rank_3.{end}" for step in (2, 4) for end in ("json.gz", "txt")]
    trace = json.loads(gzip.decompress((tmp_path / "profile" / names[0]).read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert "aten::mm" in (tmp_path / "profile" / names[1]).read_text()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "step 2" in said[0]


def test_other_ranks_and_failed_steps_write_nothing(tmp_path: Path) -> None:
    run(StepProfiler(ProfileConfig(steps=[2]), tmp_path / "profile", 1))
    with pytest.raises(RuntimeError, match="the step failed"):
        run(StepProfiler(ProfileConfig(steps=[2]), tmp_path / "profile", 0), fails_in=2)
    assert not (tmp_path / "profile").exists()
