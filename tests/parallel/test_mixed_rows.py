"""Rollouts and stored rows in one update: the same gradient under every layout, mix and packing; and proof that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rl.doctor.exactness import BOUNDS
from megatron_rl.types import Kind
from tests.forked import run_ranks
from tests.parallel.invariance import errors, never_pack, num_ranks, one_update, recorded_batch, reference
from tests.tiny_models import make_tiny_model

REHEARSAL = (
    "algorithm.name=dph_rl", "algorithm.rehearsal.pool=p", "algorithm.rehearsal.num_rows_per_update=2",
    "algorithm.rehearsal.coef=0.7",
)  # fmt: skip
JS = (*REHEARSAL, "algorithm.rehearsal.divergence=js", "algorithm.kl.coef=0")
FORWARD = (*REHEARSAL, "algorithm.rehearsal.divergence=forward_kl", "algorithm.loss_aggregation=seq-mean-token-mean")
DEFINITION = (*REHEARSAL, "algorithm.rehearsal.divergence=js_definition", "algorithm.kl.coef=0")
REPLAY = ("algorithm.name=rlep", "algorithm.replay.source=online", "algorithm.kl.coef=0")
OTHERS = {"forward": FORWARD, "definition": DEFINITION, "replay": REPLAY}
LAYOUTS = [
    {"tp": 1}, {"tp": 2, "sp": True}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}, {"dp": 2}, {"cp": 2, "dp": 2},
    {"tp": 2, "dp": 2}, {"tp": 2, "pp": 2, "cp": 2, "sp": True},
]  # fmt: skip
# Row 6: neither the loss nor a gradient nearly cancels, which float32 would show in relative errors.
MIXES = {
    "one": lambda number: number == 6,
    "half": lambda number: number % 2 == 1,
    "all but one": lambda number: number != 6,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    return make_tiny_model(folder / "qwen3", "qwen3", tied=True, seed=5, num_hidden_layers=4)


def check(model: Path, settings: tuple[str, ...], layout: dict, *, how=(), mix=MIXES["half"], mutate=None) -> None:  # type: ignore[no-untyped-def]
    batch = recorded_batch(model, *settings, is_stored=mix)
    assert len({row.kind for row in batch}) == 2
    true = reference(model, batch, *settings)
    results = run_ranks(one_update, num_ranks(layout), model, batch, layout, (*settings, *how), mutate)
    for what, error in errors(results[0], true).items():
        assert error < BOUNDS[what], (what, error)
    assert all(result["metrics"] == results[0]["metrics"] for result in results)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_gradient_under_every_layout(model: Path, layout: dict) -> None:
    check(model, JS, layout)


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("layout", [LAYOUTS[3], LAYOUTS[-1]], ids=str)
def test_every_method(model: Path, method: str, layout: dict) -> None:
    """What differs from js is a term of the loss: two layouts that together have every axis but data parallelism will do."""
    check(model, OTHERS[method], layout)


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix(model: Path, mix: str) -> None:
    """With few stored rows, most micro-batches have none; with many, most have nothing else."""
    check(model, JS, {"cp": 2, "dp": 2}, mix=MIXES[mix])


@pytest.mark.parametrize("tokens", [0, 150, 10_000])
def test_every_packing(model: Path, tokens: int) -> None:
    """0: every row alone; 10,000: all in one micro-batch, rows of both kinds side by side."""
    how = (f"policy.train_micro_batch_tokens={tokens}",) if tokens else ()
    check(model, JS, {"dp": 2}, how=how, mutate=None if tokens else never_pack)


# ------------------------------------------------------------------------------------------------ it can fail


def route_by_the_first_row() -> None:
    """What the released code does: the kind of a micro-batch's first row decides for all of it."""
    from megatron_rl.model import step

    pack = step.pack

    def wrong(samples, rows, layout):  # type: ignore[no-untyped-def]
        batch = pack(samples, rows, layout)
        batch.kind = torch.full_like(batch.kind, int(samples[rows[0]].kind))
        return batch

    step.pack = wrong


def forget_who_is_stored() -> None:
    from megatron_rl.algorithms import dph_rl

    dph_rl.Kind = type("Kind", (), {"REHEARSAL": Kind.EDGE, "RL": Kind.RL})


@pytest.mark.parametrize("mutate", [route_by_the_first_row, forget_who_is_stored], ids=lambda f: f.__name__)
def test_a_deliberate_error_is_noticed(model: Path, mutate) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError):
        check(model, JS, {"tp": 1}, how=("policy.train_micro_batch_tokens=10000",), mutate=mutate)
