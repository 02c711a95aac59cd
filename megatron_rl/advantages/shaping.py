"""Changes to a rollout's reward that do not look at its content."""

from __future__ import annotations


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer: int, penalty: float) -> float:
    """``min(0, -(T - (L_max - L_buf)) / L_buf * p)``: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    Args:
        num_tokens: T, length of the response with its end-of-sequence token.
        max_tokens: L_max, after which a response is cut.
        buffer: L_buf, the last tokens over which the penalty grows; 0 switches it off.
        penalty: p, what a response of L_max tokens loses. DAPO's 1 is half of the difference between its right and wrong.

    Returns:
        0 or less, to be added to the reward. ``overlong_penalty(2816, max_tokens=3072, buffer=512, penalty=1.0) == -0.5``.
    """
    if buffer == 0:
        return 0.0
    return min(0.0, -(num_tokens - (max_tokens - buffer)) / buffer * penalty)
