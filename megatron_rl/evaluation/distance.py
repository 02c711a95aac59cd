"""How far the policy has gone from the model that sampled a pool: the forward KL on stored tokens, for any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_rl.config import Config
from megatron_rl.data.limits import row_limit
from megatron_rl.data.pool import Pool
from megatron_rl.data.rehearsal import check_reference, rehearsal_row
from megatron_rl.errors import UserError
from megatron_rl.losses.f_divergence import f_divergence
from megatron_rl.model.step import Policy
from megatron_rl.types import TrainingSample

FIELD = "eval.pool"


def probe_rows(pool: Pool, config: Config) -> list[TrainingSample]:
    """The first ``eval.num_pool_rows`` rows that are short enough.

    Raises:
        UserError: there is none, or one cannot be compared with the policy.
    """
    limit = row_limit(config)
    fits = (pool.prompt_lengths() + pool.response_lengths()) <= limit
    if not fits.any():
        raise UserError(FIELD, str(pool.directory), f"has no row of at most {limit} tokens", "give another pool")
    check_reference(pool, fits, temperature=config.log_prob_temperature, field=FIELD)
    return [rehearsal_row(trajectory) for trajectory in pool.take(fits.nonzero()[0][: config.eval.num_pool_rows])]


def distance_metrics(policy: Policy, rows: Sequence[TrainingSample], *, batch_size: int) -> dict[str, float]:
    """Means over the tokens of the rows. A collective.

    Args:
        policy: as it is now.
        rows: of ``probe_rows``; they stay as they are.
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
