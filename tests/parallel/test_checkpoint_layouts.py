"""A checkpoint written under one layout goes on under another: weights, optimizer state and schedule."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.forked import run_ranks
from tests.parallel.invariance import config_of, num_ranks, recorded_batch
from tests.policy_case import build_policy
from tests.tiny_models import make_tiny_model

LAYOUTS = [
    {"tp": 1}, {"pp": 2, "vpp": 2}, {"cp": 2, "dp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"pp": 2, "vpp": 2, "tp": 2},
    {"tp": 1},
]  # fmt: skip


def go_on(
    model: Path, samples: list, layout: dict, directory: Path, step: int, overrides: tuple[str, ...] = ()
) -> dict[str, float]:
    """Load the checkpoint of a step (none for step 0), do one update, save the next."""
    from megatron_rl.algorithms.grpo import GRPO
    from megatron_rl.model.checkpoint import Checkpoints

    config = config_of(model, "policy.optim.lr=1e-2", *overrides, **layout)
    policy = build_policy(config)
    checkpoints = Checkpoints(directory, keep_last=9, groups=policy.groups, say=print)
    if step:
        checkpoints.load(directory / f"step_{step:08d}", policy.trainable)
    metrics = policy.train_step(samples, GRPO(config).loss)
    checkpoints.save(step + 1, policy.trainable, {"step": step + 1})
    return metrics


@pytest.mark.parametrize("case", [("qwen3", True), ("llama", False)], ids=str)
def test_a_run_wanders_through_layouts(case: tuple[str, bool], tmp_path: Path) -> None:
    """Every step under another layout gives what one rank gives; without Adam's moments the second step would not."""
    model = make_tiny_model(tmp_path / "model", case[0], tied=case[1], seed=5, num_hidden_layers=4)
    samples = recorded_batch(model)
    true = [run_ranks(go_on, 1, model, samples, {"tp": 1}, tmp_path / "one", step)[0] for step in range(len(LAYOUTS))]
    assert all(a["loss"] != b["loss"] for a, b in pairwise(true))
    for step, layout in enumerate(LAYOUTS):
        found = run_ranks(go_on, num_ranks(layout), model, samples, layout, tmp_path / "many", step)[0]
        assert found["loss"] == pytest.approx(true[step]["loss"], rel=1e-4), layout
        assert found["grad_norm"] == pytest.approx(true[step]["grad_norm"], rel=1e-5), layout


EP2 = ("policy.megatron_cfg.expert_model_parallel_size=2",)
WAYS = [({"dp": 2}, EP2), ({"tp": 1}, ()), ({"dp": 2}, EP2), ({"dp": 2}, ()), ({"dp": 2, "tp": 2, "sp": True}, EP2)]
"""With experts shared out there are two optimizers, else one."""


def test_experts_are_shared_out_anew(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "qwen3_moe", tied=False, seed=5)
    samples = recorded_batch(model)
    for step, (layout, overrides) in enumerate(WAYS):
        true = run_ranks(go_on, 1, model, samples, {"tp": 1}, tmp_path / "one", step)[0]
        found = run_ranks(go_on, num_ranks(layout), model, samples, layout, tmp_path / "many", step, overrides)[0]
        assert found["loss"] == pytest.approx(true["loss"], rel=1e-4), (layout, overrides)
        assert found["grad_norm"] == pytest.approx(true["grad_norm"], rel=1e-4), (layout, overrides)
