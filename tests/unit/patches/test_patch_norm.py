"""Torch's norms under sequence parallelism: same loss and gradients as on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.forked import run_ranks
from tests.tiny_gpt import forward_backward, init_parallel, join_grads, local_grads, make_config, make_model, wrap


def gradients(**overrides: Any) -> tuple[float, dict]:
    config = make_config(**overrides)
    init_parallel(config)
    model = wrap(make_model(config), use_distributed_optimizer=False)
    return forward_backward(model), local_grads(model)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_sequence_parallel_gives_the_gradients_of_one_rank(normalization: str) -> None:
    [(expected_loss, grads)] = run_ranks(gradients, 1, normalization=normalization)
    expected = join_grads([grads])
    ranks = run_ranks(gradients, 2, normalization=normalization, tensor_model_parallel_size=2, sequence_parallel=True)
    assert [loss for loss, _ in ranks] == pytest.approx([expected_loss] * 2, rel=1e-6)
    joined = join_grads([grads for _, grads in ranks])
    assert joined.keys() == expected.keys()
    assert any("layernorm" in name for name in joined)
    for name, grad in joined.items():
        assert (grad - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_persist_layer_norm_is_accepted() -> None:
    def build() -> tuple[bool, bool]:
        config = make_config(persist_layer_norm=True)
        init_parallel(config)
        norm = make_model(config).decoder.final_layernorm
        return isinstance(norm, torch.nn.RMSNorm), config.persist_layer_norm

    assert run_ranks(build, 1) == [(True, True)]
