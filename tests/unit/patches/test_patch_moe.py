"""Experts on one rank and spread over two give one loss."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

from tests.forked import run_ranks
from tests.tiny_gpt import forward_backward, init_parallel, local_grads, make_model, make_moe_config, wrap


def gradients(**overrides: Any) -> tuple[float, dict[str, torch.Tensor]]:
    config = make_moe_config(**overrides)
    init_parallel(config)
    model = wrap(make_model(config), use_distributed_optimizer=False)  # it would leave each rank parts
    return forward_backward(model), {name: grad for name, (grad, _) in local_grads(model).items()}


def test_split_sizes_become_arrays() -> None:
    assert isinstance(maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True), numpy.ndarray)
    assert isinstance(maybe_move_tensor_to_cpu(torch.tensor([1, 2])), torch.Tensor)
    assert maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def test_expert_parallel_gives_the_gradients_of_one_rank() -> None:
    [(expected_loss, expected)] = run_ranks(gradients, 1)
    ranks = run_ranks(gradients, 2, expert_model_parallel_size=2)
    assert sum(loss for loss, _ in ranks) / 2 == pytest.approx(expected_loss, rel=1e-6)
    seen = set()
    for _, grads in ranks:
        seen |= grads.keys()
        for name, grad in grads.items():
            assert (grad - expected[name]).norm() < 1e-5 * expected[name].norm(), name
    assert seen == expected.keys()
