"""A reward: a plain function in the place of the task's ``score``. ``data.reward: reward:brief``."""

from __future__ import annotations

from megatron_rl.types import Problem, Score


def brief(problem: Problem, response: str) -> Score:
    """Reward a right answer with 1.0, less 0.01 for each surplus word: each person in the problem allows five words."""
    words = response.split()
    is_right = "".join(words[words.index("####") + 1 :]) == problem.answer if "####" in words else False
    surplus = max(0, len(words) - 5 * problem.metadata.get("num_people", 1))
    return Score(is_right - 0.01 * surplus, {"correct": float(is_right), "surplus_words": float(surplus)})
