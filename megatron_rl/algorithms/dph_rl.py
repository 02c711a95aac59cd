"""Diversity-preserving hybrid RL (DPH-RL, arXiv 2509.07430): learn what is not solved yet, rehearse what is.

Prompts that the initial policy fails at times are explored by GRPO, without KL. Of those that it solves reliably, stored
samples of it are rehearsed: an f-divergence of the policy to the initial one, on the initial one's tokens, whose log-probs are
stored with them. No reference model runs.

    loss = token-mean over rollouts of L_GRPO  +  eta * token-mean over rehearsal rows of f(u)      u = policy / reference

Every update has ``policy.train_global_batch_size`` rollouts and ``rehearsal.num_rows_per_update`` stored rows, whatever the
layout; a row's kind decides its loss, whoever shares its micro-batch.

Deviations from the released code: both means are over the whole update (there: over whatever one rank's micro-batch held,
routed by its first row); stored rows have no reward and no group; ``js_definition`` has its factors 1/2, and acts on all
rollouts, not on a random part of the micro-batches. Stored rows have a mean of their own, whose weight is eta however many
there are. There a stored row weighs as much as a rollout, times eta: the same strength is here the released eta times
``num_rows_per_update / train_global_batch_size``, an eighth at one stored row to eight rollouts. There they are also the last
rows of a step, which makes three updates of it, the last of 32 rows a rank; here they are spread over its two updates.
"""

from __future__ import annotations

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.algorithms.parts.rehearsal import RehearsedRows
from megatron_rl.config import Config
from megatron_rl.config.methods.dph_rl import DPHRLConfig


class DPHRL(GRPO):
    """GRPO and rehearsal in one update."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.algorithm, DPHRLConfig)
        super().__init__(config, stored=RehearsedRows(config, config.algorithm.rehearsal))
