"""Errors as the exactness check measures them."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.doctor.exactness import BOUNDS, TrueOutcome, errors, load_reference, naive_log_probs, reference
from megatron_rl.types import RowKind, TrainingSample
from tests.policy_case import tiny_config
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def cancelling(tmp_path_factory: pytest.TempPathFactory) -> TrueOutcome:
    """An update of two rows, each with a mean of its own: ratios are 1 and advantages 1 and -1, so the loss is nearly 0."""
    model = make_tiny_model(tmp_path_factory.mktemp("exactness"), "qwen3", tied=True, seed=1)
    network = load_reference(model)
    overrides = ("algorithm.loss_aggregation=seq-mean-token-mean", "algorithm.kl.coef=0")
    algorithm = GRPO(tiny_config(model, *overrides))
    rows = [
        TrainingSample(
            torch.tensor([1, 2]), torch.arange(3, 3 + length), RowKind.RL, advantages=torch.full((length,), a)
        )
        for length, a in ((5, 1.0), (9, -1.0))
    ]
    for row in rows:
        with torch.no_grad():
            row.old_log_probs = naive_log_probs(network, row)[0].float()
    algorithm.assign_weights(rows)
    return reference(network, algorithm, rows)


def test_the_loss_is_measured_by_its_terms_and_not_by_what_is_left_of_them(cancelling: TrueOutcome) -> None:
    assert abs(cancelling["loss"]) < 1e-6 and cancelling["loss_size"] == pytest.approx(1.0, rel=1e-6)
    rounded = errors({**cancelling, "loss": cancelling["loss"] + 1e-7}, cancelling)
    assert all(error < BOUNDS[what] for what, error in rounded.items())
    wrong = errors({**cancelling, "loss": cancelling["loss"] + 1e-5}, cancelling)
    assert wrong["loss"] > BOUNDS["loss"]


def test_of_an_update_that_has_no_token_nothing_is_exact() -> None:
    """A mask may leave none."""
    nothing: TrueOutcome = {
        "loss": 0.0, "loss_size": 0.0, "metrics": {}, "gradients": {"w": torch.zeros(3)}, "grad_norm": 0.0,
    }  # fmt: skip
    assert set(errors(nothing, nothing).values()) == {0.0}
    something = errors({**nothing, "loss": 1e-9, "gradients": {"w": torch.ones(3)}, "grad_norm": math.nan}, nothing)
    assert something == {"loss": math.inf, "metric": 0.0, "gradient": math.inf, "grad_norm": math.inf}
