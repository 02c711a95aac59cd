"""Emulated FP8 under parallel layouts and across checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.forked import run_ranks
from tests.parallel.invariance import entropies, num_ranks, one_update, recorded_batch
from tests.parallel.test_checkpoint_layouts import go_on
from tests.tiny_models import make_tiny_model

BLOCKS = ("policy.megatron_cfg.fp8=e4m3", "policy.megatron_cfg.fp8_recipe=blockwise")
DELAYED = ("policy.megatron_cfg.fp8=hybrid", "policy.megatron_cfg.fp8_amax_history_len=2")
LAYOUTS = [{"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"cp": 2}, {"dp": 2}, {"tp": 2, "sp": True, "cp": 2}]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
"""Every rank's part of a weight is whole blocks of 128."""


def distance(a: dict, b: dict) -> float:
    """Of all gradients, relative."""
    squares = [(float((a[name] - b[name]).square().sum()), float(b[name].square().sum())) for name in b]
    return math.sqrt(sum(x for x, _ in squares) / sum(x for _, x in squares))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tied=False, seed=3, **SIZES)


@pytest.fixture(scope="module")
def samples(model: Path) -> list:
    return recorded_batch(model)


@pytest.fixture(scope="module")
def one(model: Path, samples: list) -> dict:
    """One rank, with eight bits and without."""
    return {bits: run_ranks(one_update, 1, model, samples, {}, bits)[0] for bits in ((), BLOCKS)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_are_the_same_wherever_they_lie(layout: dict, model: Path, samples: list, one: dict) -> None:
    """Up to elements that float32's last bit sends to the other side of a rounding border, and, in the weights' gradients, to
    which tokens share a block with which."""
    found = run_ranks(one_update, num_ranks(layout), model, samples, layout, BLOCKS)[0]
    effect = distance(one[BLOCKS]["gradients"], one[()]["gradients"])
    assert effect > 0.02
    assert distance(found["gradients"], one[BLOCKS]["gradients"]) < 0.02 * effect
    assert abs(one[BLOCKS]["loss"] - one[()]["loss"]) > 1e-2
    assert found["loss"] == pytest.approx(one[BLOCKS]["loss"], abs=1e-6)
    norm = torch.stack([gradient.double().norm() for gradient in found["gradients"].values()]).norm()
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_the_first_ratio_is_exact(recipe: str, model: Path, samples: list) -> None:
    """Log-prob passes and updates see the same packs; several of them, each with scales of its own."""
    bits = (
        "policy.megatron_cfg.fp8=hybrid",
        f"policy.megatron_cfg.fp8_recipe={recipe}",
        "policy.train_micro_batch_tokens=150",
    )
    run_ranks(entropies, 2, model, samples, {"dp": 2}, bits)


def two_steps(model: Path, samples: list, layout: dict, directory: Path) -> dict[str, float]:
    from megatron_rl.algorithms.grpo import GRPO
    from tests.parallel.invariance import config_of
    from tests.policy_case import build_policy

    config = config_of(model, "policy.optim.lr=1e-2", *DELAYED, **layout)
    policy = build_policy(config)
    return [policy.train_step(samples, GRPO(config).loss) for _ in range(2)][-1]


def test_eight_bits_go_on_where_sixteen_stopped(tmp_path: Path) -> None:
    """Latent attention has layers of its own, whose checkpoints say nothing of scales."""
    latent = make_tiny_model(tmp_path / "model", "deepseek_v3", tied=False, seed=3, num_hidden_layers=4)
    rows = recorded_batch(latent)
    tensorwise = ("policy.megatron_cfg.fp8=hybrid", "policy.megatron_cfg.fp8_recipe=tensorwise")
    for step, bits in enumerate(((), tensorwise, ())):
        assert math.isfinite(run_ranks(go_on, 1, latent, rows, {}, tmp_path / "run", step, bits)[0]["loss"])


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "dp": 2}], ids=str)
def test_delayed_scales_are_in_a_checkpoint(layout: dict, model: Path, samples: list, tmp_path: Path) -> None:
    """To the last bit; without them the second step would scale by 1."""
    straight = run_ranks(two_steps, num_ranks(layout), model, samples, layout, tmp_path)[0]
    for step in range(2):
        resumed = run_ranks(go_on, num_ranks(layout), model, samples, layout, tmp_path, step, DELAYED)[0]
    assert {name: resumed[name] for name in ("loss", "grad_norm")} == {
        name: straight[name] for name in ("loss", "grad_norm")
    }
