"""A reward: a plain function in the place of the task's ``score``. ``data.reward: reward:brief``."""

from __future__ import annotations

from megatron_rl.types import Problem


def brief(problem: Problem, response: str) -> float:
    """Give 1.0 for a right answer, less 0.01 for each word beyond five for each person of the problem."""
    words = response.split()
    is_right = "".join(words[words.index("####") + 1 :]) == problem.answer if "####" in words else False
    surplus = max(0, len(words) - 5 * problem.metadata.get("num_people", 1))
    return float(is_right) - 0.01 * surplus
