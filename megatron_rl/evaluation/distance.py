"""Distance of the policy from the model that sampled a pool: forward KL on stored tokens, for any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_rl.losses.f_divergence import f_divergence
from megatron_rl.model.policy import Policy
from megatron_rl.types import TrainingSample


def distance_metrics(policy: Policy, rows: Sequence[TrainingSample], *, batch_size: int) -> dict[str, float]:
    """Average the distance over the tokens of stored rows. A collective.

    Args:
        policy: the current one.
        rows: those of ``probe_rows``; they are not changed.
        batch_size: their number is filled up to a multiple of this, so that each rank gets equally many.

    Returns:
        ``eval/pool_forward_kl``: ``u - 1 - log u`` with u = policy / reference, nats; ``eval/pool_log_ratio``: ``log u``.
    """
    probes = [replace(row, old_log_probs=None) for row in rows]
    filled = probes + [replace(probes[-1]) for _ in range(-len(probes) % batch_size)]
    policy.fill_log_probs(filled, [range(len(filled))], "old_log_probs")
    now = torch.cat([row.old_log_probs for row in probes if row.old_log_probs is not None])
    reference = torch.cat([row.ref_log_probs for row in rows if row.ref_log_probs is not None])
    return {
        "eval/pool_forward_kl": float(f_divergence(now, reference, "forward_kl").double().mean()),
        "eval/pool_log_ratio": float((now - reference).double().mean()),
    }
