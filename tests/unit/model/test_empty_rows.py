"""Rows without a response token: they count for nothing, and stop nothing. And what must stop an update."""

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
    from megatron_rl.model import trainable

    trainable.plan_micro_batches = lambda *_args, **_options: [[[row] for row in range(4)]]
    config = tiny_config(model, "algorithm.kl.coef=0")
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
    with pytest.raises(AssertionError, match="optimizer update 1 = 4: have no token to train on"):
        run_ranks(update, 1, model, [0, 1, 2, 3])


def refused(model: Path, spoil: str) -> tuple[str, bool]:
    """(error, whether all weights are as they were) of this rank of two."""
    import torch.distributed as dist

    from megatron_rl.algorithms.grpo import GRPO
    from megatron_rl.errors import UserError

    config = tiny_config(model, "algorithm.kl.coef=0", dp=2)
    policy, samples = build_policy(config), random_samples(count=8)
    if spoil == "rows" and dist.get_rank() == 1:
        samples[3].advantages = samples[3].advantages * 1.001
    if spoil == "lengths" and dist.get_rank() == 1:  # same tokens in all, another border
        samples[3].prompt_ids = torch.cat([samples[3].prompt_ids, samples[3].response_ids[:1]])
        samples[3].response_ids = samples[3].response_ids[1:]
    if spoil in ("hidden", "hidden before") and dist.get_rank() == 1:
        policy.chunks[0].decoder.layers[0].register_forward_hook(
            lambda _module, _args, out: (out[0] * math.inf, out[1])
        )
    before = policy.trainable.snapshot()
    try:
        for sample in samples if spoil in ("rows", "hidden") else ():
            sample.old_log_probs = torch.zeros(sample.num_response_tokens)
        if spoil in ("hidden before", "lengths"):
            policy.fill_log_probs(samples, [range(8)], "old_log_probs")
        policy.train_step(samples, GRPO(config).loss)
    except UserError as error:
        return str(error), all(map(torch.equal, before, policy.trainable.snapshot()))
    return "accepted", False


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("rows", "rows of optimizer update 1 = 8: differ between rank 0 and rank 1"),
        ("lengths", "rows of optimizer update 1 = 8: differ between rank 0 and rank 1"),
        ("hidden", "loss at optimizer update 1 = nan: is not finite"),
        ("hidden before", "old_log_probs = 'row"),
    ],
)
def test_every_rank_refuses_alike(model: Path, spoil: str, message: str) -> None:
    results = run_ranks(refused, 2, model, spoil)
    assert all(error.startswith(message) and is_unharmed for error, is_unharmed in results), results
    assert results[0] == results[1]
