"""RehearsedRows: stored samples of the initial policy in every update, held to it by an f-divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.algorithms.parts.base import StoredRows
from megatron_rl.config import Config
from megatron_rl.config.methods.dph_rl import RehearsalConfig
from megatron_rl.data.pool import Pool, PoolNeed
from megatron_rl.data.rehearsal import Rehearsal
from megatron_rl.losses.aggregate import token_weights
from megatron_rl.losses.f_divergence import f_divergence, js_definition
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.types import POLICY_GRADIENT_KINDS, MicroBatch, Prompt, RolloutGroup, RowKind, TrainingSample

STORED = frozenset({RowKind.REHEARSAL})


class RehearsedRows(StoredRows):
    """``eta * token-mean over stored rows of f(policy / reference)``, beside the rollouts' own mean."""

    kind = RowKind.REHEARSAL
    shares_loss = False
    takes_selection = False

    def __init__(self, config: Config, settings: RehearsalConfig) -> None:
        super().__init__()
        self.config, self.settings = config, settings
        self.needs = frozenset({"ref_log_probs"} if settings.divergence == "js_definition" else ())
        self.rehearsal: Rehearsal | None = None

    @property
    def pool_need(self) -> PoolNeed:
        """The stored samples of the initial policy."""
        return PoolNeed("algorithm.rehearsal.pool", self.settings.pool, of_this_model=True, use=self.use_pool)

    def use_pool(self, pool: Pool, prompts: Sequence[Prompt]) -> str:
        """Rehearse the samples of ``pool``; returns a line for the user."""
        self.rehearsal = Rehearsal(pool, self.config)
        return self.rehearsal.summary

    def add(self, rows: Sequence[TrainingSample], groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """Put the stored rows of each update after its rollouts."""
        assert self.rehearsal is not None, "use_pool comes first"
        size = self.config.policy.train_global_batch_size
        starts = range(0, len(rows), size)
        mixed: list[TrainingSample] = []
        for number, start in enumerate(starts):
            mixed += rows[start : start + size]
            mixed += self.rehearsal.rows(update=step * len(starts) + number)
        self.metrics = {"rehearsal/rows_frac": 1 - len(rows) / len(mixed)}
        return mixed

    def assign_weights(self, rows: Sequence[TrainingSample]) -> None:
        """Give stored rows a token mean of their own; eta is a factor of their weights."""
        weights = token_weights([sample.num_response_tokens for sample in rows], "token-mean", max_tokens=1)
        for sample, weight in zip(rows, weights):
            sample.weights = torch.full((sample.num_response_tokens,), self.settings.coef * weight)

    def loss(self, terms: TokenTerms, log_probs: Tensor, batch: MicroBatch) -> TokenTerms:
        """Put the divergence in the place of stored rows' terms; ``js_definition`` acts on rollouts, too."""
        settings, reference = self.settings, batch.vectors["ref_log_probs"]
        of_rollouts = terms.loss
        if settings.divergence == "js_definition":
            divergence = js_definition(log_probs, reference)
            of_rollouts = of_rollouts + settings.coef * js_definition(reference, log_probs)
        else:
            divergence = f_divergence(log_probs, reference, settings.divergence, alpha=settings.alpha)
        stored = {
            "rehearsal/divergence": divergence,
            "rehearsal/forward_kl": f_divergence(log_probs.detach(), reference, "forward_kl"),
            "rehearsal/log_ratio": log_probs.detach() - reference,
        }
        rollouts = dict.fromkeys([*terms.means, *terms.maxima], POLICY_GRADIENT_KINDS)
        return replace(
            terms,
            loss=torch.where(batch.kind == RowKind.REHEARSAL, divergence, of_rollouts),
            means=terms.means | stored,
            kinds=rollouts | dict.fromkeys(stored, STORED),
        )
