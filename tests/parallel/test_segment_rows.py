"""Rows of which only some tokens enter the loss, and edges (long context, short target): one gradient under every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl.doctor.exactness import BOUNDS
from megatron_rl.types import Kind, TrainingSample
from tests.forked import run_ranks
from tests.parallel.invariance import config_of, errors, never_pack, num_ranks, one_update, recorded_batch, reference
from tests.tiny_models import make_tiny_model

CHAIN = ("algorithm.name=spo_chain", "algorithm.mask_threshold=0.01")
MEAN_OF_ROWS = (*CHAIN, "algorithm.loss_aggregation=seq-mean-token-mean", "algorithm.kl.coef=0")
GRPO = ("algorithm.mask_threshold=0.01",)
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
    batch = [replace(row, kind=Kind.EDGE) for row in batch]
    # One row without any token to learn from, as an edge has of which the policy was sure throughout.
    batch[2] = replace(batch[2], loss_mask=torch.zeros(1, dtype=torch.bool), weights=None)
    from megatron_rl.algorithms import build_algorithm

    build_algorithm(config_of(model, *settings)).assign_weights(batch)
    masks = torch.cat([row.loss_mask for row in batch])
    assert 0.2 < float(masks.double().mean()) < 0.8
    return batch


def check(model: Path, settings: tuple[str, ...], layout: dict, *, how=(), mutate=None) -> None:  # type: ignore[no-untyped-def]
    batch = edges_of(model, settings)
    true = reference(model, batch, *settings)
    results = run_ranks(one_update, num_ranks(layout), model, batch, layout, (*settings, *how), mutate)
    for what, error in errors(results[0], true).items():
        assert error < BOUNDS[what], (what, error)
    assert all(result["metrics"] == results[0]["metrics"] for result in results)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_gradient_under_every_layout(model: Path, layout: dict) -> None:
    check(model, CHAIN, layout)


@pytest.mark.parametrize("settings", [MEAN_OF_ROWS, GRPO], ids=["mean_of_rows", "grpo"])
def test_other_aggregations_and_methods(model: Path, settings: tuple[str, ...]) -> None:
    check(model, settings, {"cp": 2, "dp": 2})


@pytest.mark.parametrize("tokens", [0, 10_000])
def test_every_packing(model: Path, tokens: int) -> None:
    """0: every row alone, one of them without a token that counts; 10,000: all in one micro-batch."""
    how = (f"policy.train_micro_batch_tokens={tokens}",) if tokens else ()
    check(model, CHAIN, {"dp": 2}, how=how, mutate=None if tokens else never_pack)


def forget_the_mask() -> None:
    """Weights as if every token counted."""
    from megatron_rl.model import step

    pack = step.pack

    def wrong(samples, rows, layout):  # type: ignore[no-untyped-def]
        batch = pack(samples, rows, layout)
        batch.vectors["weights"] = torch.where(batch.response_mask, batch.vectors["weights"].max(), 0.0)
        return batch

    step.pack = wrong


def count_all_response_tokens() -> None:
    """Megatron divides by another number than the one that the weights were multiplied with."""
    from megatron_rl.model import step

    pack = step.pack

    def wrong(samples, rows, layout):  # type: ignore[no-untyped-def]
        batch = pack(samples, rows, layout)
        batch.loss_mask = batch.response_mask
        return batch

    step.pack = wrong


@pytest.mark.parametrize("mutate", [forget_the_mask, count_all_response_tokens], ids=lambda f: f.__name__)
def test_a_deliberate_error_is_noticed(model: Path, mutate) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError):
        check(model, CHAIN, {"tp": 1}, mutate=mutate)
