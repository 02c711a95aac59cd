"""Whether a score counts as a right answer."""

from __future__ import annotations

from megatron_rl.types import Score


def is_correct(score: Score) -> bool:
    """The ``correct`` part where the task reports one, else a positive reward."""
    return score.parts.get("correct", score.reward) > 0
