"""What the suites of this folder share. What they compare is ``megatron_rl.doctor``'s; called on forked ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rl.algorithms import build_algorithm
from megatron_rl.config import Config
from megatron_rl.doctor import exactness
from megatron_rl.doctor.exactness import BOUNDS, Outcome, TrueOutcome, errors, load_reference
from megatron_rl.types import MicroBatch, TrainingSample
from tests.forked import run_ranks
from tests.policy_case import build_policy, tiny_config

VOCAB_SIZE = 131


def recorded_batch(model: Path, *overrides: str, **how: Any) -> list[TrainingSample]:
    algorithm = build_algorithm(config_of(model, *overrides))
    return exactness.recorded_batch(load_reference(model), algorithm, vocab_size=VOCAB_SIZE, **how)


def config_of(model: Path, *overrides: str, **layout: object) -> Config:
    return tiny_config(model, "policy.optim.clip_grad=0", "rollout.temperature=1.0", *overrides, **layout)


def reference(model: Path, samples: list[TrainingSample], *overrides: str, **options: Any) -> TrueOutcome:
    return exactness.reference(load_reference(model), build_algorithm(config_of(model, *overrides)), samples, **options)


def num_ranks(layout: dict) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


def outcomes(
    model: Path,
    samples: list[TrainingSample],
    layout: dict,
    overrides: tuple[str, ...] = (),
    *,
    tokens: int | None = None,
    mutate: Callable[[], None] | None = None,
) -> list[Outcome]:
    """``one_update`` on every rank.

    Args:
        tokens: budget of a micro-batch; 0: every row goes alone; None: as configured.
        mutate: called on every rank before anything is built.
    """
    if tokens:
        overrides = (*overrides, f"policy.train_micro_batch_tokens={tokens}")
    changes = [change for change in (mutate, never_pack if tokens == 0 else None) if change is not None]
    return run_ranks(one_update, num_ranks(layout), model, samples, layout, overrides, changes)


def assert_exact(found: list[Outcome], true: TrueOutcome) -> None:
    """All ranks report the same, and it is the reference's."""
    off = outside(found[0], true)
    assert not off, off
    assert all(outcome["metrics"] == found[0]["metrics"] for outcome in found), "ranks report different numbers"


def outside(outcome: Outcome, true: TrueOutcome) -> dict[str, float]:
    """The errors that are not within bounds. Empty where a deliberate error went unnoticed: a crash gives no outcome."""
    return {what: error for what, error in errors(outcome, true).items() if not error < BOUNDS[what]}


def mutate_packs(change: Callable[[MicroBatch, list[TrainingSample], list[int]], None]) -> None:
    """Change every micro-batch once it is packed; for ``mutate``. ``change(batch, samples, its rows)``."""
    from megatron_rl.model import trainable

    pack = trainable.pack

    def wrong(samples, rows, layout):  # type: ignore[no-untyped-def]
        batch = pack(samples, rows, layout)
        change(batch, samples, rows)
        return batch

    trainable.pack = wrong


def one_update(
    model: Path,
    samples: list[TrainingSample],
    layout: dict,
    overrides: tuple[str, ...] = (),
    changes: Sequence[Callable[[], None]] = (),
) -> Outcome:
    """What the layout gives: loss, metrics, and gradients by Hugging Face name (on rank 0)."""
    for change in changes:
        change()
    config = config_of(model, *overrides, **layout)
    return exactness.one_update(build_policy(config), build_algorithm(config), samples)


def never_pack() -> None:
    """Each row goes alone."""
    from megatron_rl.model import trainable

    def alone(num_tokens, *, num_ranks, **_options):  # type: ignore[no-untyped-def]
        return [[[row] for row in range(rank, len(num_tokens), num_ranks)] for rank in range(num_ranks)]

    trainable.plan_micro_batches = alone


def entropies(
    model: Path, samples: list[TrainingSample], layout: dict, overrides: tuple[str, ...] = ()
) -> list[torch.Tensor]:
    """Of each response token, row by row, as the layout computes them; after a check that the first ratio is exact,
    and that an update which brings its own old log-probs brings the same bits."""
    config = config_of(model, *overrides, **layout)
    policy, algorithm = build_policy(config), build_algorithm(config)
    samples = [replace(row, old_log_probs=None) for row in samples]
    policy.fill_log_probs(samples, [range(len(samples))], "old_log_probs", "entropy")
    policy.trainable.optimizer.step = lambda: (True, 0.0, None)
    assert policy.train_step(samples, algorithm.loss)["ratio/max_abs_log_ratio"] == 0.0
    fresh = [replace(row, old_log_probs=None) for row in samples]
    policy.train_step(fresh, algorithm.loss)
    for row, own in zip(samples, fresh, strict=True):  # the update's own pass gives what the pass ahead of it gave
        assert torch.equal(row.old_log_probs, own.old_log_probs)
    return [row.entropy for row in samples]
