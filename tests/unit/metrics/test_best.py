"""Which steps are the best of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_rl.config.trainer import CheckpointConfig
from megatron_rl.errors import UserError
from megatron_rl.metrics.best import BestSteps, read_best

VALUES = [0.2, 0.5, math.nan, 0.5, 0.7, 0.1]


def offered(**settings: object) -> BestSteps:
    best = BestSteps(CheckpointConfig(metric_name="eval/pass@1", **settings))  # type: ignore[arg-type]
    for step, value in enumerate(VALUES, 1):
        best.offer(step, {"eval/pass@1": value})
    return best


def test_the_highest_or_the_lowest_and_of_equals_the_earliest() -> None:
    assert offered().steps == [5]
    assert offered(keep_best=3).steps == [5, 2, 4]
    assert offered(keep_best=2, higher_is_better=False).steps == [6, 1]


def test_a_step_without_a_finite_value_is_none_and_is_told_once() -> None:
    said: list[str] = []
    best = BestSteps(CheckpointConfig(metric_name="rewards/mean"), say=said.append)
    assert not best.offer(1, {"reward/mean": 1.0}) and not best.offer(2, {"reward/mean": 1.0})
    assert said == ["step 1 has no metric rewards/mean, by which the best step is chosen (reward/mean)"]
    assert not best.offer(3, {"rewards/mean": math.inf}) and best.steps == []


def test_a_resumed_run_goes_on_with_those_it_had() -> None:
    settings = CheckpointConfig(metric_name="loss", higher_is_better=False)
    earlier = BestSteps(settings)
    earlier.offer(4, {"loss": 0.3})
    best = BestSteps(settings, json.loads(json.dumps(earlier.state())))
    assert not best.offer(5, {"loss": 0.4}) and best.offer(6, {"loss": 0.2})
    assert best.state()["best"] == [{"step": 6, "value": 0.2}]


def test_values_of_another_metric_are_not_compared() -> None:
    said: list[str] = []
    losses = BestSteps(CheckpointConfig(metric_name="loss", higher_is_better=False))
    losses.offer(4, {"loss": 3.0})
    best = BestSteps(CheckpointConfig(metric_name="eval/pass@1"), losses.state(), said.append)
    assert best.offer(5, {"eval/pass@1": 0.5}) and best.steps == [5]
    assert said == [
        "the best steps so far were by loss (lower is better), not by eval/pass@1 (higher is better): none of them counts"
    ]
    assert BestSteps(CheckpointConfig(), losses.state()).state() == losses.state()  # for a later start


def test_the_file_says_the_best_and_what_is_exported(tmp_path: Path) -> None:
    assert read_best(tmp_path) == (None, None)
    offered().write(tmp_path, exported=2)
    assert read_best(tmp_path) == (5, 2)
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        read_best(tmp_path)
