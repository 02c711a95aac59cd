"""f-divergences: numbers worked out by hand, whole distributions, gradients in closed form, extreme ratios."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_rl.losses.f_divergence import Generator, f_divergence, js_definition

TABLE = [
    # divergence, alpha, f(0.5), f(2)
    ("forward_kl", 0.5, 0.193147, 0.306853),
    ("js", 0.5, 0.084950, 0.169899),
    ("alpha", 0.2, 0.160318, 0.368118),
    ("alpha", 0.5, 0.171573, 0.343146),
    ("alpha", 0.8, 0.184059, 0.320635),
    ("reverse_kl", 0.5, 0.153426, 0.386294),
]
POLICY, REFERENCE = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])


def of_ratio(u: float, divergence: Generator, alpha: float) -> float:
    return float(f_divergence(torch.tensor([math.log(u)]), torch.zeros(1), divergence, alpha=alpha))


@pytest.mark.parametrize(("divergence", "alpha", "at_half", "at_two"), TABLE)
def test_values_are_those_of_the_table(divergence: Generator, alpha: float, at_half: float, at_two: float) -> None:
    assert of_ratio(0.5, divergence, alpha) == pytest.approx(at_half, abs=1e-6)
    assert of_ratio(2.0, divergence, alpha) == pytest.approx(at_two, abs=1e-6)
    assert of_ratio(1.0, divergence, alpha) == 0.0


@pytest.mark.parametrize(
    ("divergence", "alpha", "expected"),
    [
        ("forward_kl", 0.5, 0.192042),
        ("reverse_kl", 0.5, 0.183787),
        ("js", 0.5, 0.092402),
        ("alpha", 0.2, 0.184446),
        ("alpha", 0.5, 0.186343),
        ("alpha", 0.8, 0.189368),
    ],
)
def test_expectation_over_the_reference_is_the_divergence(divergence: Generator, alpha: float, expected: float) -> None:
    terms = f_divergence(POLICY.log(), REFERENCE.log(), divergence, alpha=alpha)
    assert float((REFERENCE * terms).sum()) == pytest.approx(expected, abs=1e-6)


def test_both_halves_by_definition_are_the_js_divergence() -> None:
    reference_half = (REFERENCE * js_definition(POLICY.log(), REFERENCE.log())).sum()
    policy_half = (POLICY * js_definition(REFERENCE.log(), POLICY.log())).sum()
    assert float(reference_half + policy_half) == pytest.approx(0.046201, abs=1e-6)


def closed_form(log_u: Tensor, divergence: Generator, alpha: float) -> Tensor:
    """In float64."""
    u = log_u.exp()
    return {
        "forward_kl": u - 1,
        "js": u * (math.log(2) - torch.nn.functional.softplus(-log_u)),
        "alpha": (u - u ** (1 - alpha)) / alpha,
        "reverse_kl": u * log_u,
        "likelihood": torch.full_like(u, -1.0),
    }[divergence]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("divergence", "alpha"), [(d, a) for d, a, _, _ in TABLE] + [("likelihood", 0.5)])
def test_gradient_is_the_closed_form(divergence: Generator, alpha: float, dtype: torch.dtype) -> None:
    log_u = torch.cat([torch.linspace(-30, 30, 241), torch.tensor([1e-3, -1e-3, 1e-5, -1e-5])]).to(dtype)
    ref = torch.zeros_like(log_u)
    log_probs = log_u.clone().requires_grad_()
    terms = f_divergence(log_probs, ref, divergence, alpha=alpha)
    assert terms.dtype == torch.float32 and bool(terms.isfinite().all())
    (gradient,) = torch.autograd.grad(terms.sum(), log_probs)
    expected = closed_form(log_u.double(), divergence, alpha)
    bound = 1e-5 if dtype == torch.float32 else 2**-8  # the gradient comes back in the input's type
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=bound, atol=1e-30)


@pytest.mark.parametrize("log_u", [-1e4, -90.0, 90.0, 1e4])
@pytest.mark.parametrize(("divergence", "alpha"), [(d, a) for d, a, _, _ in TABLE] + [("likelihood", 0.5)])
def test_extreme_ratios_stay_finite_and_a_forgotten_token_keeps_its_pull(
    divergence: Generator, alpha: float, log_u: float
) -> None:
    log_probs = torch.tensor([log_u], requires_grad=True)
    terms = f_divergence(log_probs, torch.zeros(1), divergence, alpha=alpha)
    (gradient,) = torch.autograd.grad(terms.sum(), log_probs)
    assert bool(terms.isfinite().all()) and bool(gradient.isfinite().all())
    if divergence in ("forward_kl", "likelihood") and log_u < 0:
        assert float(gradient) == pytest.approx(-1.0)
    elif log_u > 0 and divergence != "likelihood":
        assert float(gradient) > 1e6


@pytest.mark.parametrize(("divergence", "alpha"), [(d, a) for d, a, _, _ in TABLE])
def test_values_and_gradients_near_one_do_not_cancel(divergence: Generator, alpha: float) -> None:
    """f is (log u)^2 / 2 there, for js a quarter; float32's rounding of 1 is 6e-8."""
    log_probs = torch.tensor([2e-3], requires_grad=True)
    terms = f_divergence(log_probs, torch.zeros(1), divergence, alpha=alpha)
    (gradient,) = torch.autograd.grad(terms.sum(), log_probs)
    curvature = 0.5 if divergence == "js" else 1.0
    assert float(gradient) == pytest.approx(curvature * 2e-3, rel=3e-3)
    assert float(terms.detach()) == pytest.approx(curvature * 2e-6, rel=1e-1)


def test_expected_gradient_of_forward_kl_is_that_of_the_divergence() -> None:
    logits = POLICY.log().clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    (sampled,) = torch.autograd.grad(
        (REFERENCE * f_divergence(log_probs, REFERENCE.log(), "forward_kl")).sum(), logits, retain_graph=True
    )
    (exact,) = torch.autograd.grad((REFERENCE * (REFERENCE.log() - log_probs)).sum(), logits)
    torch.testing.assert_close(sampled, exact, rtol=1e-5, atol=1e-6)


def test_alpha_lies_between_the_two_kls() -> None:
    near_reverse, near_forward = of_ratio(3.0, "alpha", 1e-3), of_ratio(3.0, "alpha", 1 - 1e-3)
    assert near_reverse == pytest.approx(of_ratio(3.0, "reverse_kl", 0.5), rel=1e-2)
    assert near_forward == pytest.approx(of_ratio(3.0, "forward_kl", 0.5), rel=1e-2)
