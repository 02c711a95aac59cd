"""Rows without a response token: they count for nothing, and stop nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.forked import run_ranks
from tests.policy_case import build_policy, random_samples, tiny_config
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tied=True, seed=0)


def update(model: Path, empty: list[int]) -> dict[str, float]:
    from megatron_rl.algorithms.grpo import GRPO

    config = tiny_config(model, "policy.train_micro_batch_tokens=1", "algorithm.kl.coef=0")  # one row a micro-batch
    policy, samples = build_policy(config), random_samples(count=4)
    for row in empty:
        samples[row].response_ids = samples[row].response_ids[:0]
        samples[row].advantages = samples[row].weights = torch.zeros(0)
    policy.fill_log_probs(samples, [range(4)], "old_log_probs")
    return policy.train_step(samples, GRPO(config).loss)


def test_a_micro_batch_without_response_tokens(model: Path) -> None:
    [metrics] = run_ranks(update, 1, model, [1])
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["ratio/max"] == 1.0 and metrics["ratio/mean"] == pytest.approx(1.0)


def test_a_mini_batch_without_response_tokens(model: Path) -> None:
    [metrics] = run_ranks(update, 1, model, [0, 1, 2, 3])
    assert metrics["loss"] == metrics["grad_norm"] == 0.0
