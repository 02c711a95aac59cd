"""A loss with a ratio of whole sequences: one gradient under every layout and packing, against a row alone in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.doctor.exactness import TrueOutcome, load_reference
from megatron_rl.doctor.exactness import reference as reference_of
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.types import MicroBatch
from tests.parallel import invariance
from tests.parallel.invariance import assert_exact, config_of, mutate_packs, outcomes, outside, recorded_batch
from tests.tiny_models import make_tiny_model

LAYOUTS = [
    {"tp": 2, "sp": True}, {"pp": 2, "vpp": 2}, {"cp": 2}, {"cp": 4}, {"dp": 2}, {"cp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "cp": 2, "sp": True},
]  # fmt: skip


def clipped(ratio: Tensor, batch: MicroBatch) -> TokenTerms:
    """The clipped policy loss of a ratio that all tokens of a sequence share (GSPO, arXiv 2507.18071 eq. 5)."""
    advantages, limited = batch.vectors["advantages"], ratio.clamp(0.98, 1.02)
    loss = -torch.minimum(ratio * advantages, limited * advantages)
    return TokenTerms(loss=loss, means={"ratio/mean": ratio, "clip_frac": (ratio != limited).to(ratio.dtype)})


class SequenceRatio(GRPO):
    """Sums over sequences as a method writes them."""

    def loss(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """The ratio is ``exp`` of the mean log-ratio of the sequence."""
        count = batch.sequence_sum(batch.response_mask.to(log_probs.dtype)).clamp(min=1)
        mean = batch.sequence_sum(log_probs - batch.vectors["old_log_probs"]) / count
        return clipped(batch.to_tokens(mean.exp()), batch)


class RowAlone(GRPO):
    """The same for a batch that holds one whole row and nothing else."""

    def loss(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """The ratio is ``exp`` of the mean log-ratio of the row."""
        mean = (log_probs - batch.vectors["old_log_probs"]).mean()
        return clipped(mean.exp().expand(len(log_probs)), batch)


def use_sequence_ratio() -> None:
    invariance.build_algorithm = SequenceRatio


def use_local_sums() -> None:
    """Each context-parallel rank takes the sums over its own tokens for those of the sequences."""

    def forget(batch, _samples, _rows):  # type: ignore[no-untyped-def]
        batch.sum_over_cp = None

    use_sequence_ratio()
    mutate_packs(forget)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, TrueOutcome]:
    folder = tmp_path_factory.mktemp("sequences")
    model = make_tiny_model(folder / "qwen3", "qwen3", tied=True, seed=5, num_hidden_layers=4)
    batch = recorded_batch(model)
    true = reference_of(load_reference(model), RowAlone(config_of(model)), batch)
    assert 0.1 < true["metrics"]["clip_frac"] < 0.9
    return model, batch, true


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_gradient_under_every_layout(case: tuple, layout: dict) -> None:
    model, batch, true = case
    assert_exact(outcomes(model, batch, layout, mutate=use_sequence_ratio), true)


@pytest.mark.parametrize("tokens", [0, 150, 10_000])
@pytest.mark.parametrize("layout", [{"tp": 1}, {"cp": 2, "dp": 2}], ids=str)
def test_every_packing(case: tuple, layout: dict, tokens: int) -> None:
    """0: every row alone; 10,000: all in one micro-batch."""
    model, batch, true = case
    assert_exact(outcomes(model, batch, layout, tokens=tokens, mutate=use_sequence_ratio), true)


def test_sums_over_a_rank_s_own_tokens_are_noticed(case: tuple) -> None:
    model, batch, true = case
    assert outside(outcomes(model, batch, {"cp": 2}, mutate=use_local_sums)[0], true)
