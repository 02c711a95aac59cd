"""pass@k from n samples of one problem."""

from __future__ import annotations

import math

from megatron_rl.errors import UserError


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the chance that k of the samples, drawn without replacement, hold a correct one: ``1 - C(n - c, k) / C(n, k)``.

    An unbiased estimate of the chance that k fresh samples hold one (Chen et al., 2107.03374, equation 1); "any of the first k"
    has the same mean and more noise. Computed as ``1 - prod_{j = n - c + 1}^{n} (1 - k / j)``, which stays in range
    where the binomials overflow a float.

    Args:
        num_samples: n, at least 1.
        num_correct: c, 0 to n.
        k: 1 to n; k = 1 gives c / n.

    Raises:
        UserError: a count is out of range.

    Example:
        ``pass_at_k(10, 3, 5)`` is 0.916667.
    """
    if not 0 <= num_correct <= num_samples:
        raise UserError(
            "num_correct", num_correct, f"must be 0 to num_samples = {num_samples}", "count the samples again"
        )
    if not 1 <= k <= num_samples:
        raise UserError("k", k, f"must be 1 to num_samples = {num_samples}", "draw more samples or lower k")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(num_samples - num_correct + 1, num_samples + 1))
