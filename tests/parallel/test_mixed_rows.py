"""Rollouts and stored rows in one update: the same gradient under every layout, mix and packing; and proof that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.types import RowKind, TrainingSample
from tests.parallel.invariance import assert_exact, mutate_packs, outcomes, outside, recorded_batch, reference
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


def mixed(model: Path, settings: tuple[str, ...] = JS, mix: str = "half") -> list[TrainingSample]:
    batch = recorded_batch(model, *settings, is_stored=MIXES[mix])
    assert len({row.kind for row in batch}) == 2
    return batch


def check(model: Path, settings: tuple[str, ...], layout: dict, *, mix: str = "half", **how) -> None:  # type: ignore[no-untyped-def]
    batch = mixed(model, settings, mix)
    assert_exact(outcomes(model, batch, layout, settings, **how), reference(model, batch, *settings))


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
    check(model, JS, {"cp": 2, "dp": 2}, mix=mix)


@pytest.mark.parametrize("tokens", [0, 150, 10_000])
def test_every_packing(model: Path, tokens: int) -> None:
    """0: every row alone; 10,000: all in one micro-batch, rows of both kinds side by side."""
    check(model, JS, {"dp": 2}, tokens=tokens)


# ------------------------------------------------------------------------------------------------ it can fail


def route_by_the_first_row() -> None:
    """What the released code does: the kind of a micro-batch's first row decides for all of it."""
    mutate_packs(lambda batch, samples, rows: batch.kind.fill_(int(samples[rows[0]].kind)))


def forget_who_is_stored() -> None:
    from megatron_rl.algorithms.parts import rehearsal

    rehearsal.RowKind = type("RowKind", (), {"REHEARSAL": RowKind.EDGE, "RL": RowKind.RL})


@pytest.mark.parametrize("first", [RowKind.RL, RowKind.REHEARSAL], ids=lambda kind: kind.name)
def test_routing_by_the_first_row_is_noticed(model: Path, first: RowKind) -> None:
    """Whichever kind the first row of the only micro-batch, the longest of all, is of."""
    batch = recorded_batch(model, *JS, is_stored=lambda number: (number % 2 == 1) == (first == RowKind.REHEARSAL))
    assert max(batch, key=lambda row: row.num_tokens).kind == first
    found = outcomes(model, batch, {"tp": 1}, JS, tokens=10_000, mutate=route_by_the_first_row)
    assert outside(found[0], reference(model, batch, *JS))


def test_stored_rows_taken_for_rollouts_are_noticed(model: Path) -> None:
    batch = mixed(model)
    found = outcomes(model, batch, {"tp": 1}, JS, mutate=forget_who_is_stored)
    assert outside(found[0], reference(model, batch, *JS))
