"""Diversity-preserving hybrid RL (DPH-RL, arXiv 2509.07430): learn what is not solved yet, rehearse what is.

Prompts that the initial policy fails at times are explored by GRPO, without KL. Of those that it solves reliably, stored
samples of it are rehearsed: an f-divergence of the policy to the initial one, on the initial one's tokens, whose log-probs are
stored with them. No reference model runs.

    loss = token-mean over rollouts of L_GRPO  +  eta * token-mean over rehearsal rows of f(u)      u = policy / reference

Every update has ``policy.train_global_batch_size`` rollouts and ``rehearsal.num_rows_per_update`` stored rows, whatever the
layout; a row's kind decides its loss, whoever shares its micro-batch.

Deviations from the released code: both means are over the whole update (there: over whatever one rank's micro-batch held,
routed by its first row); stored rows have no reward and no group; ``js_definition`` has its factors 1/2, and acts on all
rollouts, not on a random part of the micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.config import Config, DPHRLConfig
from megatron_rl.data.pool import Pool, PoolNeed
from megatron_rl.data.rehearsal import Rehearsal
from megatron_rl.losses.aggregate import token_weights
from megatron_rl.losses.f_divergence import f_divergence, js_definition
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.types import MicroBatch, Prompt, RolloutGroup, RowKind, TrainingSample

REHEARSAL = frozenset({RowKind.REHEARSAL})


class DPHRL(GRPO):
    """GRPO and rehearsal in one update."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.algorithm, DPHRLConfig)
        self.rehearsal_settings = config.algorithm.rehearsal
        self.needs_reference |= self.rehearsal_settings.divergence == "js_definition"
        self.rehearsal: Rehearsal | None = None

    @property
    def pool_need(self) -> PoolNeed:
        """The stored samples of the initial policy."""
        return PoolNeed("algorithm.rehearsal.pool", self.rehearsal_settings.pool, of_this_model=True, use=self.use_pool)

    def use_pool(self, pool: Pool, prompts: Sequence[Prompt]) -> str:
        """Rehearse these samples; see ``PoolNeed``."""
        self.rehearsal = Rehearsal(pool, self.config)
        return self.rehearsal.summary

    # ---- rows

    def samples(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """Rollouts, and after those of each update its stored rows."""
        assert self.rehearsal is not None, "use_pool comes first"
        rollouts = super().samples(groups, step)
        size = self.config.policy.train_global_batch_size
        starts = range(0, len(rollouts), size)
        rows: list[TrainingSample] = []
        for number, start in enumerate(starts):
            rows += rollouts[start : start + size]
            rows += self.rehearsal.rows(update=step * len(starts) + number)
        self._metrics["rehearsal/rows_frac"] = 1 - len(rollouts) / len(rows)
        return rows

    def mini_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """As ``samples`` has put them together."""
        size = self.config.policy.train_global_batch_size + self.rehearsal_settings.num_rows_per_update
        return [list(range(start, start + size)) for start in range(0, len(samples), size)]

    def assign_weights(self, mini_batch: Sequence[TrainingSample]) -> None:
        """Two means, each over its own rows; eta is a factor of the second's weights."""
        super().assign_weights([sample for sample in mini_batch if sample.kind is not RowKind.REHEARSAL])
        stored = [sample for sample in mini_batch if sample.kind is RowKind.REHEARSAL]
        weights = token_weights([sample.num_response_tokens for sample in stored], "token-mean", max_tokens=1)
        for sample, weight in zip(stored, weights):
            sample.weights = torch.full((sample.num_response_tokens,), self.rehearsal_settings.coef * weight)

    # ---- loss

    def loss(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """GRPO's loss of rollouts, the divergence of stored rows; each row by its own kind."""
        settings, reference = self.rehearsal_settings, batch.vectors["ref_log_probs"]
        terms = super().loss(log_probs, entropy, batch)
        of_rollouts = terms.loss
        if settings.divergence == "js_definition":
            divergence = js_definition(log_probs, reference)
            of_rollouts = of_rollouts + settings.coef * js_definition(reference, log_probs)
        else:
            divergence = f_divergence(log_probs, reference, settings.divergence, alpha=settings.alpha)
        log_u = log_probs.detach() - reference
        stored = {
            "rehearsal/divergence": divergence,
            "rehearsal/forward_kl": f_divergence(log_probs.detach(), reference, "forward_kl"),
            "rehearsal/log_ratio": log_u,
        }
        return replace(
            terms,
            loss=torch.where(batch.kind == RowKind.REHEARSAL, divergence, of_rollouts),
            means=terms.means | stored,
            kinds=dict.fromkeys([*terms.means, *terms.maxima], frozenset({RowKind.RL}))
            | dict.fromkeys(stored, REHEARSAL),
        )
