"""Rows of which only some tokens enter the loss, and edges (long context, short target): one gradient under every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms import build_algorithm
from megatron_rl.types import RowKind, TrainingSample
from tests.parallel.invariance import (
    assert_exact,
    config_of,
    mutate_packs,
    outcomes,
    outside,
    recorded_batch,
    reference,
)
from tests.tiny_models import make_tiny_model

CHAIN = ("algorithm.name=spo_chain", "algorithm.selection.max_probability=0.01")
TREE = (
    "algorithm={name: spo_tree, num_prompts_per_step: 4, selection: {max_probability: 0.01}}",
    "algorithm.kl={coef: 0.01, estimator: k2}",
)
OTHERS = {
    "tree": TREE,
    "tree, constant divisor": (*TREE, "algorithm.loss_aggregation=seq-mean-token-sum-norm", "algorithm.kl.coef=0"),
    "chain, mean of rows": (*CHAIN, "algorithm.loss_aggregation=seq-mean-token-mean", "algorithm.kl.coef=0"),
    "grpo": ("algorithm.selection.max_probability=0.01",),
}
LAYOUTS = [
    {"tp": 2, "sp": True}, {"pp": 2, "vpp": 2}, {"cp": 2}, {"dp": 2}, {"cp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "cp": 2, "sp": True},
]  # fmt: skip
EDGES = ((120, 7), (3, 4), (64, 1), (119, 7), (70, 30), (5, 2), (90, 3), (33, 11))
"""(context, target) tokens: edges of several levels, whose contexts share their beginning in a real tree."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segments")
    return make_tiny_model(folder / "qwen3", "qwen3", tied=True, seed=5, num_hidden_layers=4)


def edges_of(model: Path, settings: tuple[str, ...]) -> list[TrainingSample]:
    batch = recorded_batch(model, *settings, lengths=EDGES)
    batch = [replace(row, kind=RowKind.EDGE) for row in batch]
    # One row without any token to learn from, as an edge has of which the policy was sure throughout.
    batch[2] = replace(batch[2], loss_mask=torch.zeros(1, dtype=torch.bool), weights=None)
    build_algorithm(config_of(model, *settings)).assign_weights(batch)
    masks = torch.cat([row.loss_mask for row in batch])
    assert 0.2 < float(masks.double().mean()) < 0.8
    return batch


def check(model: Path, settings: tuple[str, ...], layout: dict, **how) -> None:  # type: ignore[no-untyped-def]
    batch = edges_of(model, settings)
    assert_exact(outcomes(model, batch, layout, settings, **how), reference(model, batch, *settings))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_gradient_under_every_layout(model: Path, layout: dict) -> None:
    check(model, CHAIN, layout)


@pytest.mark.parametrize("layout", [{"cp": 2, "dp": 2}, LAYOUTS[-1]], ids=str)
@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_and_aggregations(model: Path, method: str, layout: dict) -> None:
    check(model, OTHERS[method], layout)


@pytest.mark.parametrize("tokens", [0, 150, 10_000])
@pytest.mark.parametrize("layout", [{"dp": 2}, LAYOUTS[-1]], ids=str)
def test_every_packing(model: Path, layout: dict, tokens: int) -> None:
    """0: every row alone, one of them without a token that counts; 10,000: all in one micro-batch."""
    check(model, TREE, layout, tokens=tokens)


# ------------------------------------------------------------------------------------------------ it can fail


def forget_the_mask() -> None:
    """Weights as if every token counted."""

    def forget(batch, _samples, _rows):  # type: ignore[no-untyped-def]
        batch.vectors["weights"] = torch.where(batch.response_mask, batch.vectors["weights"].max(), 0.0)

    mutate_packs(forget)


def count_all_response_tokens() -> None:
    """Megatron divides by another number than the one that the weights were multiplied with."""

    def count(batch, _samples, _rows):  # type: ignore[no-untyped-def]
        batch.loss_mask = batch.response_mask

    mutate_packs(count)


@pytest.mark.parametrize("mutate", [forget_the_mask, count_all_response_tokens], ids=lambda f: f.__name__)
def test_a_deliberate_error_is_noticed(model: Path, mutate) -> None:  # type: ignore[no-untyped-def]
    batch = edges_of(model, CHAIN)
    found = outcomes(model, batch, {"tp": 1}, CHAIN, mutate=mutate)
    assert outside(found[0], reference(model, batch, *CHAIN))
