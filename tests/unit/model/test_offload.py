"""Gradients and optimizer state go and come back; training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import load_config
from tests.forked import run_ranks
from tests.parallel.invariance import config_of, num_ranks, recorded_batch
from tests.policy_case import build_policy
from tests.tiny_models import make_tiny_model

CONFIG = Path(__file__).parents[2] / "tiny.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_moe", tied=False, seed=3)


def steps(model: Path, samples: list, layout: dict, overrides: tuple[str, ...], directory: Path | None) -> Any:
    """Three updates; with a directory, the memory is given up around each, and a checkpoint written in between."""
    from megatron_rl.algorithms.grpo import GRPO
    from megatron_rl.model.checkpoint import Checkpoints

    config = config_of(model, "policy.optim.lr=1e-2", *overrides, **layout)
    policy = build_policy(config)
    found, freed = [], []
    for step in range(3):
        if directory is not None:
            freed.append(policy.trainable.update_memory.release())
            assert policy.trainable.update_memory.is_released and policy.trainable.update_memory.release() == 0
            assert all(
                buffer.grad_data.untyped_storage().nbytes() == 0 for buffer in policy.trainable.gradient_buffers()
            )
            policy.fill_log_probs(samples, [range(len(samples))], "ref_log_probs")
            assert policy.trainable.update_memory.is_released, "a forward pass needs none of it"
            if step == 2:
                Checkpoints(directory, keep_last=1, groups=policy.groups, say=print).save(step, policy.trainable, {})
                assert policy.trainable.update_memory.is_released, "gradients are not needed for it"
                assert all(tensor.untyped_storage().nbytes() for tensor in policy.trainable.update_memory._state())
                policy.trainable.update_memory.release()
        found.append(policy.train_step(samples, GRPO(config).loss))
    sizes = sum(parameter.numel() for parameter in policy.trainable.parameters())
    return found, freed, sizes


def test_gradients_in_sixteen_bits_leave_nothing_behind(model: Path) -> None:
    """Megatron makes float32 copies of them for the optimizer, and keeps those until the next step."""
    samples = recorded_batch(model)

    def left() -> int:
        from megatron_rl.algorithms.grpo import GRPO

        config = config_of(model, "trainer.precision=bf16", "policy.ddp_cfg.grad_reduce_in_fp32=false")
        policy = build_policy(config)
        policy.train_step(samples, GRPO(config).loss)
        policy.trainable.update_memory.release()
        groups = (
            group
            for part in policy.trainable.optimizer.chained_optimizers
            for group in part.shard_fp32_from_float16_groups
        )
        return sum(
            tensor.grad.untyped_storage().nbytes() for group in groups for tensor in group if tensor.grad is not None
        )

    assert run_ranks(left, 1) == [0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [{}, {"dp": 2}, {"tp": 2, "sp": True}], ids=str)
def test_training_does_not_notice(precision: str, layout: dict, model: Path, tmp_path: Path) -> None:
    samples = recorded_batch(model)
    overrides = (f"trainer.precision={precision}",)
    straight = run_ranks(steps, num_ranks(layout), model, samples, layout, overrides, None)
    offloaded = run_ranks(steps, num_ranks(layout), model, samples, layout, overrides, tmp_path)
    for (metrics, _, _), (others, freed, size) in zip(straight, offloaded, strict=True):
        assert metrics == others
        shares = layout.get("dp", 1)
        # Float32 gradients; from the second time on, two moments, and main weights where the model's have 16 bits.
        state = (8 if precision == "fp32" else 12) / shares
        assert freed[0] >= 4 * size
        assert freed[2] == pytest.approx((4 + state) * size, rel=0.05)


def test_colocated_servers_are_made_room_for() -> None:
    def offloads(*overrides: str) -> bool:
        return load_config(CONFIG, ["policy.model_path=x", *overrides]).offloads_during_rollouts

    colocated = ("rollout.engine=sglang", "rollout.servers.placement=colocated")
    assert offloads(*colocated) and not offloads("rollout.engine=sglang") and not offloads()
    assert not offloads(*colocated, "trainer.offload_during_rollouts=false")
    assert offloads("trainer.offload_during_rollouts=true")
