"""Verifiers, the sources of scores: the ``score`` of a problem's task, or the function of ``data.reward`` in its place.

Judges (a model that grades responses) would be a third source, beside these two and outside the scoring workers.
"""

from __future__ import annotations

import math
import numbers
from functools import cache
from typing import Any

from megatron_rl.tasks import get_task
from megatron_rl.tasks.reward import Verifier, get_reward
from megatron_rl.types import Score


@cache
def get_verifier(task_name: str, reward: str | None) -> Verifier:
    """Return the verifier of a task's problems: ``reward`` if there is one, else the task's ``score``.

    Args:
        task_name: a name that ``megatron_rl.tasks.get_task`` knows.
        reward: ``package.module:FUNCTION``, or None.

    Raises:
        UserError: there is no such task, or no such function.
    """
    return get_task(task_name).score if reward is None else get_reward(reward)


def as_score(value: Any) -> Score:
    """Return a function's result as a ``Score`` of plain data, which can travel to all ranks.

    A number r is ``Score(r, parts={"correct": 1.0 if r >= 1 else 0.0})``.

    Raises:
        TypeError: it is neither a number nor a Score, or the Score holds something else than numbers and strings.
        ValueError: a reward is not finite.
    """
    if not isinstance(value, Score):
        if not isinstance(value, numbers.Real):  # NumPy's numbers are real, too
            raise TypeError(f"{type(value).__name__} is neither a Score nor a float")
        reward = float(value)
        value = Score(reward, {"correct": float(reward >= 1)}, "correct" if reward >= 1 else "wrong")
    for number in (value.reward, *value.parts.values()):
        if not isinstance(number, (int, float)):
            raise TypeError(f"a reward is a {type(number).__name__}, not a float")
        if not math.isfinite(number):
            raise ValueError("a reward is not finite")
    if not (isinstance(value.reason, str) and isinstance(value.answer, str) and isinstance(value.style, str)):
        raise TypeError("reason, answer and style of a Score must be strings")
    return value
