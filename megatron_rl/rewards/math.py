r"""Answers of mathematics problems: find the final answer in a response and compare it with the reference.

    answers    which part of the response is the answer: a box, ``####``, a sentence
    notation   one spelling for LaTeX, Unicode, ASCII and Markdown
    quantity   numbers with a unit, exactly          (units: which words are units)
    equality   the rules, in order                   (formula, solutions: what is left for math-verify, and how)
    engine     math-verify, behind guards

Some formulas take long to compute, and hold the GIL: run this in the scoring pool, whose deadline is the only protection.
"""

from __future__ import annotations

from megatron_rl.rewards.answers import find_marked_answer
from megatron_rl.rewards.equality import is_equal, is_equal_to_last
from megatron_rl.types import FinishReason, Score

TAIL_CHARS = 1000
"""An answer without a mark is searched for in this many characters of the end."""


def score_math(answer: str, response: str, *, finish_reason: FinishReason = "stop", lenient: bool = False) -> Score:
    """Reward 1.0 where the final answer of ``response`` equals ``answer``, else 0.0.

    Args:
        answer: the reference: a number, or LaTeX without ``$``.
        response: the whole text.
        finish_reason: why generation ended. A response that did not stop by itself earns nothing, unless ``lenient``.
        lenient: take the last expression of the end where no answer is marked, and judge cut responses like others.

    Returns:
        ``parts["correct"]`` is the reward; ``parts["format"]`` is 1.0 where the answer is marked. ``reason`` is ``correct``,
        ``wrong``, ``no answer`` or ``cut``.
    """
    if finish_reason != "stop" and not lenient:
        return _no_answer("cut")
    marked = find_marked_answer(response)
    if marked is None and lenient:
        found = is_equal_to_last(answer, response[-TAIL_CHARS:])
        return _no_answer() if found is None else _judged(found, is_marked=False)
    return _judged(is_equal(answer, marked), is_marked=True) if marked else _no_answer()


def _judged(is_correct: bool, *, is_marked: bool) -> Score:
    parts = {"correct": float(is_correct), "format": float(is_marked)}
    return Score(float(is_correct), parts, "correct" if is_correct else "wrong")


def _no_answer(reason: str = "no answer") -> Score:
    return Score(0.0, {"correct": 0.0, "format": 0.0}, reason)
