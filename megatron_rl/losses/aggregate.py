"""Every aggregation of token terms into one loss is one weight per token, fixed before packing."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.config.methods.base import Aggregation


def token_weights(num_tokens: Sequence[int], aggregation: Aggregation, *, max_tokens: int) -> list[float]:
    """The weight that each token of each row gets, so that ``sum(weight * term)`` is the aggregated loss.

    Args:
        num_tokens: loss tokens of every row of the optimizer mini-batch, over all ranks; rows with 0 have no weight.
        aggregation: ``token-mean`` divides by all tokens (DAPO, arXiv 2503.14476 eq. 8); ``seq-mean-token-mean`` by the
            row's own tokens, then by the rows (GRPO, arXiv 2402.03300 eq. 3); ``seq-mean-token-sum-norm`` by
            ``max_tokens``, then by the rows (Dr. GRPO, arXiv 2503.20783; verl's of this name divides by a length only).
        max_tokens: the constant length of ``seq-mean-token-sum-norm``.

    Returns:
        One weight per row; each of the row's tokens gets it.
    """
    total, rows = sum(num_tokens), sum(n > 0 for n in num_tokens)
    if total == 0:
        return [0.0] * len(num_tokens)
    if aggregation == "token-mean":
        return [1.0 / total if n else 0.0 for n in num_tokens]
    if aggregation == "seq-mean-token-mean":
        return [1.0 / (rows * n) if n else 0.0 for n in num_tokens]
    return [1.0 / (rows * max_tokens) if n else 0.0 for n in num_tokens]
