"""A model without an optimizer: it computes the same, and holds weights alone."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import run_ranks
from tests.parallel.invariance import num_ranks
from tests.policy_case import build_policy, random_samples, tiny_config
from tests.tiny_models import make_tiny_model

LAYOUTS: list[dict[str, Any]] = [{}, {"pp": 2, "vpp": 2}, {"tp": 2, "sp": True}, {"cp": 2}, {"dp": 2}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tied=True, seed=3, num_hidden_layers=4)


def frozen_policy(config: Any) -> Any:
    """The policy of ``build_policy`` without an optimizer."""
    from contextlib import nullcontext

    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.convert.hf.reader import HFReader
    from megatron_rl.model.build import build_groups_of
    from megatron_rl.model.policy import Policy
    from megatron_rl.model.trainable import Trainable
    from megatron_rl.model.weights import load_hf_weights

    directory = Path(config.policy.model_path)
    shape, groups = read_shape(directory), build_groups_of(config, torch.device("cpu"))
    trainable = Trainable(
        config,
        shape,
        groups,
        optim=None,
        fill_weights=lambda chunks: load_hf_weights(chunks, shape, groups, lambda: HFReader(directory)),
        timer=lambda _phase: nullcontext(),
    )
    return Policy(trainable)


def held_bytes() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def log_probs_and_bytes(model: Path, layout: dict, precision: str, *, is_frozen: bool) -> tuple[list, int, int]:
    """(log-probs of each row, bytes held beyond those of before, bytes of the weights)."""
    config, before = tiny_config(model, f"trainer.precision={precision}", **layout), held_bytes()
    policy = (frozen_policy if is_frozen else build_policy)(config)
    held = held_bytes() - before
    rows = random_samples()
    policy.fill_log_probs(rows, [range(len(rows))], "old_log_probs", "entropy")
    if is_frozen:
        assert not list(policy.trainable.gradient_buffers()) and not policy.trainable.has_optimizer
        assert not any(hasattr(p, "main_grad") or p.requires_grad for p in policy.trainable.parameters())
        assert policy.trainable.update_memory.release() == 0 and not policy.trainable.update_memory.is_released
    vectors = [(row.old_log_probs, row.entropy) for row in rows]
    return vectors, held, sum(p.nbytes for p in policy.trainable.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_same_bits_from_weights_alone(layout: dict, precision: str, model: Path) -> None:
    frozen = run_ranks(log_probs_and_bytes, num_ranks(layout), model, layout, precision, is_frozen=True)
    trained = run_ranks(log_probs_and_bytes, num_ranks(layout), model, layout, precision, is_frozen=False)
    for (found, held, weights), (wanted, held_by_trained, _) in zip(frozen, trained, strict=True):
        for pair, wanted_pair in zip(found, wanted, strict=True):
            assert all(map(torch.equal, pair, wanted_pair))
        assert held < 1.1 * weights + 50_000 < held_by_trained


def saved(model: Path, directory: Path) -> list[torch.Tensor]:
    """The weights after an update, which a checkpoint holds as well."""
    from megatron_rl.algorithms.grpo import GRPO
    from megatron_rl.model.checkpoint import Checkpoints

    config = tiny_config(model, "algorithm.kl.coef=0", "policy.optim.lr=1e-2")
    policy = build_policy(config)
    policy.train_step(random_samples(), GRPO(config).loss)
    Checkpoints(directory, keep_last=1, groups=policy.groups, say=print).save(1, policy.trainable, {"step": 1})
    return policy.trainable.snapshot()


def loaded(model: Path, directory: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """The weights before and after loading that checkpoint, and the count of updates."""
    from megatron_rl.model.checkpoint import Checkpoints

    trainable = frozen_policy(tiny_config(model)).trainable
    before = trainable.snapshot()
    checkpoints = Checkpoints(directory, keep_last=1, groups=trainable.groups, say=print)
    checkpoints.load(directory / "step_00000001", trainable)
    return before, trainable.snapshot(), trainable.num_updates


def test_it_loads_the_weights_of_a_checkpoint(model: Path, tmp_path: Path) -> None:
    [wanted] = run_ranks(saved, 1, model, tmp_path)
    [(before, after, num_updates)] = run_ranks(loaded, 1, model, tmp_path)
    assert not any(map(torch.equal, before, wanted)) and all(map(torch.equal, after, wanted))
    assert num_updates == 1
