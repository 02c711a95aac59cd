r"""Equality of final answers: rules in order, each of which decides or passes on; math-verify decides what is left.

A reference that is one number equals only what reads as one number: no text that merely contains it. The rules lean to
"different" where a text is not understood, since a reward for a wrong answer teaches more harm than a lost one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from megatron_rl.rewards import engine
from megatron_rl.rewards.formula import as_latex, has_relation, is_arithmetic, is_misread, plain, words
from megatron_rl.rewards.notation import closes_at_end, normalise, top_level, without_wrappers
from megatron_rl.rewards.quantity import Quantity, read_quantity, split_equation
from megatron_rl.rewards.solutions import solutions
from megatron_rl.rewards.units import NUMBER_WORDS

MAX_ANSWER_CHARS = 1000
"""Longer answers are wrong unread: parsing is slower than linear, and no reference is near this length."""

_CHOICE = re.compile(
    r"(?:\(([A-J])\)|([A-J])[.):](?=\s))\s*(?P<value>(?!or\b|and\b)[^\s(](?!.*(?:\bor\b|\band\b)).*)", re.DOTALL
)
_LONE_CHOICE = re.compile(r"\(([A-J])\)|([A-J])[.):]?")
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)\s*(?P<half>[ap])?\.?\s?(?(half)m)\.?", re.ASCII | re.IGNORECASE
)
_BASED = re.compile(
    r"(?![A-Z]_)(?P<digits>[0-9A-Z]+)(?:_\{?\s*(?P<base>\d{1,2}|[a-z]{3,9})\s*\}?|\s*\(?\s*(?:in\s+)?base[\s-]+(?P<spoken>\w+)\s*\)?)",
    re.ASCII | re.IGNORECASE,
)
_DIGITS = re.compile("[0-9A-Z]+", re.ASCII | re.IGNORECASE)
_CAPITALS = re.compile("[A-Z]{2,}")
_OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])")
_APPROXIMATE = re.compile(r"\\approx(?![A-Za-z])")
_DECIMALS = re.compile(r"\.(\d+)", re.ASCII)


@dataclass(frozen=True)
class FinalAnswer:
    """A final answer with its readings, each made once and only when it is asked for."""

    text: str
    """The answer in the spelling of ``notation.normalise``."""

    @cached_property
    def quantity(self) -> Quantity | None:
        """The number that it is, with at most a unit; None for anything else."""
        return read_quantity(self.text)

    @cached_property
    def plain(self) -> str:
        """The text for comparison as it stands."""
        return plain(self.text)

    @cached_property
    def flat(self) -> str:
        r"""The text without ``\text`` around its words."""
        return without_wrappers(self.text).strip()

    @cached_property
    def latex(self) -> str:
        """The answer as LaTeX for the parser."""
        return as_latex(self.text)

    @cached_property
    def expression(self) -> Any | None:
        """The parsed formula; None where it is none."""
        return None if is_misread(self.latex) else engine.parse_formula(self.latex)

    @cached_property
    def numbers(self) -> list[Any]:
        """The one number that it is, after an ``=``: two for a percentage, none if it is no number."""
        if self.quantity is not None:
            return engine.as_numbers(self.quantity)
        equation = split_equation(self.text)
        if equation is None:
            return []
        value = FinalAnswer(equation.right) if equation.left else self
        return engine.only_number(value.expression) if is_arithmetic(value.latex) else []


def is_equal(answer: str, given: str) -> bool:
    """Tell whether the final answer ``given`` of a response equals the reference ``answer``."""
    if given.strip() == answer.strip():
        return True
    if len(given) > MAX_ANSWER_CHARS:
        return False
    return _is_same(_reference(answer), FinalAnswer(normalise(given)))


def is_equal_to_last(answer: str, text: str) -> bool | None:
    """Tell whether the last expression that math-verify finds in a text equals the reference; None where it finds none."""
    found = engine.find_last(text)
    if not found:
        return None
    ours = _reference(answer)
    mine = ours.numbers or [ours.expression]
    return any(
        engine.equal(one, other) for one in mine for other in found if one is not None and not isinstance(other, str)
    )


@lru_cache(maxsize=4096)
def _reference(answer: str) -> FinalAnswer:
    return FinalAnswer(normalise(answer))


def _is_same(ours: FinalAnswer, theirs: FinalAnswer) -> bool:
    for rule in _RULES:
        verdict = rule(ours, theirs)
        if verdict is not None:
            return verdict
    return _by_expression(ours, theirs)


def _by_rounding(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    r"""Either side of ``25\pi \approx 78.54`` is the answer if the right one is the left one, rounded or cut at its last place.

    Of ``99.6 \approx 100`` only the right side is the answer, since both are plain numbers.
    """
    if r"\approx" not in theirs.text:
        return None
    places = [match.span() for match in _APPROXIMATE.finditer(top_level(theirs.text))]
    if not places or not theirs.text[: places[-1][0]].strip():
        return None
    exact, rounded = (
        FinalAnswer(theirs.text[: places[-1][0]].strip()),
        FinalAnswer(theirs.text[places[-1][1] :].strip()),
    )
    if exact.quantity is not None and (exact.quantity.is_rounded or exact.quantity.value.denominator == 1):
        return None
    if not exact.numbers or not rounded.numbers:
        return None
    decimals = _DECIMALS.search(rounded.text)
    if not engine.is_rounded(exact.numbers[0], rounded.numbers[0], len(decimals[1]) if decimals else 0):
        return False  # two answers
    return _is_same(ours, rounded) or _is_same(ours, exact)


def _by_quantity(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    if ours.quantity is None or theirs.quantity is None or ours.quantity.solves_equation:
        return None
    return ours.quantity.equals(theirs.quantity)


def _by_text(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    r"""Equal texts are equal; a sequence with ``\ldots`` in it is compared no further."""
    if not theirs.plain:
        return False
    if ours.plain == theirs.plain:
        return True
    return False if r"\ldots" in ours.text or r"\ldots" in theirs.text else None


def _by_choice(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    """``(C) 5`` is the choice C and the value 5: each is compared where both sides have it."""
    our_letter, our_value = _choice(ours)
    letter, value = _choice(theirs)
    if our_letter and letter:
        return our_letter == letter and (our_value is None or value is None or _is_same(our_value, value))
    if our_letter and our_value:
        return _is_same(our_value, theirs)
    return _is_same(ours, value) if letter and value else None


def _choice(answer: FinalAnswer) -> tuple[str, FinalAnswer | None]:
    if lone := _LONE_CHOICE.fullmatch(answer.flat):
        return lone[1] or lone[2], None
    if match := _CHOICE.fullmatch(answer.flat):
        return match[1] or match[2], FinalAnswer(match["value"])
    return "", None


def _by_base(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    """``52_8`` and ``52_9`` differ; where only one side names its base, the digits decide."""
    our_digits, our_base = _based(ours)
    digits, base = _based(theirs)
    if our_base is None and base is None:
        return None
    return our_digits == digits and (our_base is None or base is None or our_base == base)


def _based(answer: FinalAnswer) -> tuple[str, int | None]:
    equation = split_equation(answer.flat)
    text = equation.right if equation else answer.flat
    match = _BASED.fullmatch(text)
    spoken = (match["base"] or match["spoken"]).lower() if match else ""
    base = NUMBER_WORDS.index(spoken) if spoken in NUMBER_WORDS else int(spoken) if spoken.isdecimal() else 0
    if match and 2 <= base <= 36 and all(int(digit, 36) < base for digit in match["digits"]):
        return match["digits"].lstrip("0").upper(), base
    return (text.lstrip("0").upper() if _DIGITS.fullmatch(text) else text), None


def _by_clock(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    """``1:20`` and ``2:40`` are two times, though equal ratios."""
    mine, other = _CLOCK.fullmatch(ours.flat), _CLOCK.fullmatch(theirs.flat)
    if not mine or not other:
        return None
    halves = {match["half"].lower() for match in (mine, other) if match["half"]}
    return int(mine["hour"]) == int(other["hour"]) and mine["minute"] == other["minute"] and len(halves) < 2


def _by_brackets(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    r"""A set ``\{1, 2\}`` is no pair ``(1, 2)``; a list without brackets may be either, an alternative no pair."""
    our_kind, kind = _brackets(ours), _brackets(theirs)
    is_alternative = our_kind == "(" and _OR.search(theirs.flat) is not None
    return False if is_alternative or (our_kind and kind and our_kind != kind) else None


def _brackets(answer: FinalAnswer) -> str:
    text = answer.text
    if "," not in text or not text.startswith((r"\{", "(", "[")) or not closes_at_end(text):
        return ""
    return "{" if text.startswith("\\") else "("


def _by_words(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    """A text with words, or of capitals, equals its own text alone: ``ACB`` is no product, and ``5 if x > 0`` not 5."""
    return False if _CAPITALS.fullmatch(ours.flat) or words(ours.latex) or words(theirs.latex) else None


def _by_number(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    if "=" in ours.text or not ours.numbers:
        return None
    if ":" in theirs.text and ":" not in ours.text and any(mine.is_Integer for mine in ours.numbers):
        return False  # 10:2 may be a time
    return any(engine.equal(mine, other) for mine in ours.numbers for other in theirs.numbers)


def _by_solutions(ours: FinalAnswer, theirs: FinalAnswer) -> bool | None:
    """An inequality in one variable equals its interval."""
    if not has_relation(ours.text) and not has_relation(theirs.text):
        return None
    mine, other = solutions(ours.text), solutions(theirs.text)
    if mine is None or other is None:
        return None
    same_variable = not mine.variable or not other.variable or mine.variable == other.variable
    return same_variable and engine.verify([mine.values], [other.values])


_RULES = (
    _by_rounding, _by_quantity, _by_text, _by_choice, _by_base, _by_clock, _by_brackets, _by_words, _by_number, _by_solutions,
)  # fmt: skip


def _by_expression(ours: FinalAnswer, theirs: FinalAnswer) -> bool:
    if plain(ours.latex) == plain(theirs.latex):
        return True  # beside its unit
    if ours.expression is None or theirs.expression is None:
        return False
    if has_relation(theirs.text) and not has_relation(ours.text):
        return False  # x + 1 is not what differs from it
    return engine.equal(ours.expression, theirs.expression)
