"""Verdicts: what judges the problems of a task, and what it says, as scores.

Judges (a model that grades responses) would be a third source, beside a task's ``score`` and ``data.reward``, and outside the
scoring workers.
"""

from __future__ import annotations

import asyncio
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from megatron_rl import plugins
from megatron_rl.tasks.reward import Attempt, Verifier, find_verifier
from megatron_rl.types import Score

REWARD_KEYS = ("reward", "score")
"""Names of the reward in a dict."""


@cache
def get_verifier(task_name: str, reward: str | None, kwargs: str = "{}") -> Verifier:
    """Return what judges a task's problems: ``reward`` if there is one, else the task's ``score``.

    Args:
        task_name: a name that ``megatron_rl.tasks.get_task`` knows.
        reward: ``package.module:FUNCTION`` or ``file.py:FUNCTION``, or None.
        kwargs: further arguments, a dict as JSON.

    Raises:
        UserError: there is no such task, or no such function, or it does not take the arguments.
    """
    return find_verifier(task_name, reward, json.loads(kwargs))


def judge(verifier: Verifier, attempts: Sequence[Attempt], timeout_s: float) -> list[Score]:
    """Judge some attempts of one verifier; an async one judges them at the same time.

    Args:
        verifier: one that ``takes_many``, or is async; else there is one attempt.
        attempts: to judge.
        timeout_s: of each, for those that run at the same time.

    Raises:
        Exception: whatever a plain function raises, or the wrong number of results. Of async ones each has its own failure.
    """
    if verifier.is_async:
        return asyncio.run(_judge_async(verifier, attempts, timeout_s))
    if not verifier.takes_many:
        return [as_score(verifier.call(attempts))]
    return _all_of(verifier.call(attempts), attempts)


async def _judge_async(verifier: Verifier, attempts: Sequence[Attempt], timeout_s: float) -> list[Score]:
    if verifier.takes_many:
        return _all_of(await verifier.call(attempts), attempts)

    async def one(attempt: Attempt) -> Score:
        try:
            return as_score(await asyncio.wait_for(verifier.call([attempt]), timeout_s))
        except TimeoutError:
            return failure("timeout")
        except Exception as error:
            return failure(crash(error))

    return list(await asyncio.gather(*map(one, attempts)))


def _all_of(results: Any, attempts: Sequence[Attempt]) -> list[Score]:
    found = list(results)
    if len(found) != len(attempts):
        raise ValueError(f"{len(found)} results for {len(attempts)} responses")
    return list(map(as_score, found))


def failure(reason: str) -> Score:
    """Return the score of a response that could not be judged."""
    return Score(0.0, reason=reason, is_failure=True)


def crash(error: BaseException) -> str:
    """Say what a verifier raised."""
    return f"crash: {type(error).__name__}: {error}"[:200]


def as_score(value: Any) -> Score:
    """Return a function's result as a ``Score`` of plain data, which can travel to all ranks.

    A number r is ``Score(r, parts={"correct": 1.0 if r >= 1 else 0.0})``. Of a dict, ``reward`` (or ``score``) is the reward,
    ``reason`` and ``answer`` are texts, and the other numbers are parts; verl's ``acc`` is ``correct``.

    Raises:
        TypeError: it is nothing of the kind, or holds something else than numbers and texts.
        ValueError: a reward is not finite.
    """
    if not isinstance(value, Score):
        score = _from_dict(value) if isinstance(value, Mapping) else Score(value)
        parts = {"correct": float(_number(score.reward, "the reward") >= 1)} | score.parts
        value = replace(score, parts=parts, reason=score.reason or ("correct" if parts["correct"] > 0 else "wrong"))
    parts = {name: _number(part, f"the part {name!r}") for name, part in value.parts.items()}
    if not (isinstance(value.reason, str) and isinstance(value.answer, str) and isinstance(value.style, str)):
        raise TypeError("reason, answer and style of a Score must be strings")
    reward = _number(value.reward, "the reward")
    return value if reward is value.reward and parts == value.parts else replace(value, reward=reward, parts=parts)


def _from_dict(value: Mapping[str, Any]) -> Score:
    key = next((key for key in REWARD_KEYS if key in value), None)
    if key is None:
        raise TypeError(f"the dict has neither {' nor '.join(map(repr, REWARD_KEYS))}: {', '.join(map(str, value))}")
    parts = {str(name): float(part) for name, part in value.items() if name != key and isinstance(part, numbers.Real)}
    if "acc" in parts:
        parts.setdefault("correct", parts.pop("acc"))
    texts = {name: value[name] for name in ("reason", "answer") if isinstance(value.get(name), str)}
    return Score(value[key], parts, texts.get("reason", ""), answer=texts.get("answer", "")[:64])


def _number(value: Any, what: str) -> float:
    if type(value) is float and math.isfinite(value):  # nearly all
        return value
    if not isinstance(value, numbers.Real):  # NumPy's numbers are real, too
        raise TypeError(f"{what} is {plugins.kind_of(value)}, not a number")
    if not math.isfinite(value):
        raise ValueError(f"{what} is not finite")
    return float(value)
