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


# d = log policy - log reference -> value of k3 and its gradient for the log-prob
K3 = {
    -500.0: (10.0, 0.0),
    -30.0: (10.0, 0.0),
    -20.1: (10.0, 0.0),
    -19.9: (10.0, 0.0),
    -5.0: (10.0, 0.0),
    -2.7: (10.0, 0.0),
    -2.0: (4.389056, -6.389056),
    -1e-4: (5.000167e-9, -1.00005e-4),
    0.0: (0.0, 0.0),
    1e-4: (4.999833e-9, 0.99995e-4),
    3.0: (2.049787, 0.950213),
    10.9: (9.900018, 0.999982),
    11.1: (10.0, 0.0),
    500.0: (10.0, 0.0),
}


@pytest.mark.parametrize(("difference", "value", "gradient"), [(d, *expected) for d, expected in K3.items()])
def test_k3_and_its_clamp(difference: float, value: float, gradient: float) -> None:
    log_probs = torch.tensor([difference], requires_grad=True)
    found = kl_estimate(log_probs, torch.zeros(1), "k3")
    found.sum().backward()
    assert found.item() == pytest.approx(value, rel=3e-3 if value < 1e-6 else 1e-6)
    assert log_probs.grad.item() == pytest.approx(gradient, rel=3e-3 if value < 1e-6 else 1e-6)


def test_k3_never_pulls_away_from_the_reference() -> None:
    """Descent raises a log-prob below the reference, or leaves it; and no value is negative, however small."""
    sizes = torch.logspace(-8, 3, 4001)
    log_probs = torch.cat([-sizes, sizes]).requires_grad_()
    value = kl_estimate(log_probs, torch.zeros_like(log_probs), "k3")
    value.sum().backward()
    assert bool((value >= 0).all()) and bool((log_probs.grad * log_probs.sign() >= 0).all())
