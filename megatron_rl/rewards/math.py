"""Answers of mathematics problems: find the final answer in a response and compare it with the reference.

The answer is looked for in this order: the last ``\\boxed{...}`` with something in it, the last ``#### ...`` line, the
last expression that math-verify finds. Two plain numbers are compared here, exactly, units and thousands separators
aside; everything else is math-verify's. An answer such as ``9^{9^{9^9}}`` computes for ever and holds the GIL: run
this in the scoring pool, whose deadline is the only protection.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_rl.types import Score

MAX_ANSWER_CHARS = 1000
"""Longer answers are wrong unread: parsing is slower than linear, and no reference is near this length."""
TAIL_CHARS = 1000
"""If no answer is marked, the last expression is searched for in this many characters of the end."""

_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\[\\{}]|(?P<open>\{)|(?P<close>\})")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|~")
_PLAIN = re.compile(
    r"(?P<sign>[+-]?)\s*"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
    r"(?:(?P<unit>\s+[A-Za-z][A-Za-z .'/-]*|[A-Za-z]{2,}[A-Za-z .'/-]*)(?:\^\{?[23]\}?|[²³])?)?",
    re.ASCII,
)
_ONE_LETTER_UNITS = frozenset("adghlms")
_NOT_UNITS = frozenset(
    {"and", "or", "to", "by", "plus", "minus", "times", "over", "divided", "mod", "squared", "cubed", "pi", "sqrt"}
    | {"percent", "dozen", "hundred", "thousand", "million", "billion", "trillion"}
)
"""Words that change a number instead of naming what is counted."""


def score_math(answer: str, response: str) -> Score:
    """Reward 1.0 where the final answer of ``response`` equals ``answer``, else 0.0.

    Args:
        answer: the reference: a number, or LaTeX without ``$``.
        response: the whole text.

    Returns:
        ``parts["correct"]`` is the reward; ``parts["format"]`` is 1.0 where the answer was boxed or after ``####``.
    """
    marked = find_marked_answer(response)
    if marked is not None:
        is_correct = _is_equal(answer, marked)
    else:
        found = _parse(response[-TAIL_CHARS:])
        if not found:
            return Score(0.0, {"correct": 0.0, "format": 0.0}, "no answer")
        is_correct = _verify(_parse_reference(answer), found)
    parts = {"correct": float(is_correct), "format": float(marked is not None)}
    return Score(float(is_correct), parts, "correct" if is_correct else "wrong")


def find_marked_answer(response: str) -> str | None:
    """Return the content of the last non-empty box, else the text after the last ``####`` on its line, else None."""
    boxed = _last_boxed(response)
    if boxed is not None:
        return boxed
    _, mark, rest = response.rpartition("####")
    line = rest.strip().partition("\n")[0].strip()
    return line if mark and line else None


def _last_boxed(response: str) -> str | None:
    """Find the last box in one pass with a stack; a search from each box is quadratic in a response of unclosed boxes."""
    open_braces: list[int | None] = []  # where the content of a box starts; None for a brace that is no box
    best_start, best = -1, None
    for match in _BRACES.finditer(response):
        if match["box"]:
            open_braces.append(match.end())
        elif match["open"]:
            open_braces.append(None)
        elif match["close"] and open_braces:
            start = open_braces.pop()
            if start is not None and start > best_start and (content := response[start : match.start()].strip()):
                best_start, best = start, content
    return best


def _is_equal(answer: str, marked: str) -> bool:
    if marked == answer.strip():
        return True
    if len(marked) > MAX_ANSWER_CHARS:
        return False
    expected, given = _plain_number(answer), _plain_number(marked)
    if expected is not None and given is not None:
        return round(expected - given, 6) == 0  # math-verify compares to 6 decimals as well
    return _verify(_parse_reference(answer), _parse(f"\\boxed{{{_tidy(marked)}}}"))


def _plain_number(text: str) -> Fraction | None:
    """Read ``-$1,234.50 per month`` as -1234.5; None unless the text is one number with at most a unit."""
    text = _TEXT.sub(r" \1", _tidy(text)).replace("{,}", ",")
    text = _SPACING.sub("", text).translate(_CURRENCY).strip()
    match = _PLAIN.fullmatch(text)
    if match is None or not _is_unit(match["unit"] or ""):
        return None
    # Fraction needs no digit limit: MAX_ANSWER_CHARS is below Python's own of 4300.
    return Fraction(match["sign"] + re.sub(r"[, ]", "", match["number"]).rstrip("."))


_CURRENCY = str.maketrans("", "", "\\$€£¥")


def _is_unit(text: str) -> bool:
    words = re.findall("[a-z]+", text.lower())
    return all(word not in _NOT_UNITS and (len(word) > 1 or word in _ONE_LETTER_UNITS) for word in words)


def _tidy(text: str) -> str:
    """Leave out Markdown bold and the full stop, which math-verify stumbles over; write minus signs as ``-``."""
    return text.replace("\N{MINUS SIGN}", "-").strip("* \t\n").rstrip(".").strip("* \t\n")


def _parse(text: str) -> list[Any]:
    return _math_verify().parse(text, parsing_timeout=None)


@lru_cache(maxsize=4096)
def _parse_reference(answer: str) -> list[Any]:
    return _parse(f"\\boxed{{{answer}}}")


def _verify(reference: list[Any], found: list[Any]) -> bool:
    return bool(_math_verify().verify(reference, found, timeout_seconds=None))


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    """Import the module at its first use: it takes half a second, which reading a problem file need not pay.

    Its own time limits are switched off in every call: they use ``signal.alarm``, which works in the main thread only and
    not in C code that never looks for signals. It warns of that in every process, hence the log level.
    """
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
