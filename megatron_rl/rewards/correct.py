"""The rule for a right answer."""

from __future__ import annotations

from megatron_rl.types import Score


def is_correct(score: Score) -> bool:
    """Tell whether a score counts as a right answer: by its ``correct`` part if it has one, else by a positive reward."""
    return score.parts.get("correct", score.reward) > 0
