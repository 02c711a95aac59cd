"""Values, and what the gradients really are, on an exact categorical distribution."""

import pytest
import torch

from megatron_rl.losses.kl import kl_estimate

LOGITS = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.9, 0.2, -0.4], dtype=torch.float64).log_softmax(0)


def expected_gradient(estimator: str) -> torch.Tensor:
    """E over the policy's samples of the estimator's own gradient (the sampling is not differentiated)."""
    logits = LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    (log_probs.detach().exp() * kl_estimate(log_probs, REFERENCE, estimator)).sum().backward()
    return logits.grad


def true_gradient(direction: str) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    p, q = logits.log_softmax(0), REFERENCE
    ((p.exp() * (p - q)).sum() if direction == "reverse" else (q.exp() * (q - p)).sum()).backward()
    return logits.grad


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expected_value_is_the_reverse_kl(estimator: str) -> None:
    p = LOGITS.log_softmax(0)
    value = (p.exp() * kl_estimate(p, REFERENCE, estimator)).sum()
    torch.testing.assert_close(value, (p.exp() * (p - REFERENCE)).sum())


def test_k1_has_no_gradient() -> None:
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(3, dtype=torch.float64))


def test_k2_has_the_gradient_of_the_reverse_kl() -> None:
    torch.testing.assert_close(expected_gradient("k2"), true_gradient("reverse"))


def test_k3_has_the_gradient_of_the_forward_kl() -> None:
    torch.testing.assert_close(expected_gradient("k3"), true_gradient("forward"))


def test_k3_is_finite_far_below_the_reference() -> None:
    assert torch.isfinite(kl_estimate(torch.tensor([-500.0]), torch.tensor([0.0]), "k3")).all()
