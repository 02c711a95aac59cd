import math

import pytest
import torch

from megatron_rl.losses.clipped_policy import clipped_policy_loss


def loss(ratio: float, advantage: float, **kwargs: float) -> tuple[float, float, float]:
    """(loss, gradient by the log-prob, clipped) of one token whose ratio is given."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    terms = clipped_policy_loss(
        log_prob, torch.zeros(1), torch.tensor([advantage]), **({"clip_min": 0.2, "clip_max": 0.28} | kwargs)
    )
    terms.loss.sum().backward()
    return terms.loss.item(), log_prob.grad.item(), terms.is_clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.27, 1.0, -1.27, -1.27, 0),  # inside clip-higher, outside 0.2
        (1.5, 1.0, -1.28, 0.0, 1),  # good token, already much likelier
        (0.5, 1.0, -0.5, -0.5, 0),  # good token that became rarer: never clipped
        (0.5, -1.0, 0.8, 0.0, 1),  # bad token, already much rarer
        (1.5, -1.0, 1.5, 1.5, 0),  # bad token that became likelier: never clipped
    ],
)
def test_each_side_of_the_clip(ratio: float, advantage: float, expected: float, gradient: float, clipped: int) -> None:
    value, slope, is_clipped = loss(ratio, advantage)
    assert value == pytest.approx(expected, rel=1e-6)
    assert slope == pytest.approx(gradient, rel=1e-6)
    assert is_clipped == clipped


def test_dual_clip_bounds_bad_tokens_only() -> None:
    assert loss(5.0, -1.0, dual_clip=3.0)[:2] == (3.0, 0.0)
    assert loss(2.0, -1.0, dual_clip=3.0)[:2] == pytest.approx((2.0, 2.0))
    assert loss(0.1, 1.0, dual_clip=3.0)[0] == pytest.approx(-0.1)


def test_a_capped_token_is_not_a_clipped_one() -> None:
    """The clip fraction is of the two sides of PPO's maximum alone."""
    terms = clipped_policy_loss(
        torch.tensor([5.0, 0.5, 2.0]).log(), torch.zeros(3), -torch.ones(3), clip_min=0.2, clip_max=0.28, dual_clip=3.0
    )
    assert terms.is_capped.tolist() == [1.0, 0.0, 0.0]
    assert terms.is_clipped.tolist() == [0.0, 1.0, 0.0]


def test_extreme_log_ratio_stays_finite() -> None:
    terms = clipped_policy_loss(
        torch.tensor([1000.0]), torch.zeros(1), torch.tensor([-1.0]), clip_min=0.2, clip_max=0.2
    )
    assert torch.isfinite(terms.loss).all()
