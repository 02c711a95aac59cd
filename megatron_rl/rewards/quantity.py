r"""Quantities: texts that are one number with at most a unit, read as exact fractions.

    ``-$1,234.50 per month``   -1234.5            ``11 5/6``, ``2\frac{1}{2}``   71/6, 5/2
    ``5 \text{ million}``      5000000            ``x = 5 \text{ km}``           5
    ``50\%``                   50, a percentage   ``5 feet 6 inches``            none: two quantities

A word that is neither a unit nor a scale makes the text no quantity: ``5 or more``, ``at least 5``, ``5 if x > 0``.
Texts are in the form of ``notation.normalise``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_rl.rewards.notation import GREEK, top_level, without_wrappers
from megatron_rl.rewards.units import is_unit, leading_scale

ABSOLUTE_TOLERANCE = Fraction(5, 10**7)
"""Half a unit of the sixth decimal, which is where math-verify rounds to."""
RELATIVE_TOLERANCE = Fraction(5, 10**6)
"""A share of the larger value: 0.333333 equals 1/3 and 0.083333 equals 1/12, but 0.000001 does not equal 0.0000014."""


@dataclass(frozen=True)
class Quantity:
    """A number as it was written."""

    value: Fraction
    r"""50 for ``50\%``."""
    is_percent: bool = False
    is_rounded: bool = False
    """True where it has a decimal point: it may stand for a value near by. Other numbers are exact."""
    name: str = ""
    """The left side of its equation, if variables stand there: ``x`` of ``x = 5``, ``a + b`` of ``a + b = 5``."""

    @property
    def solves_equation(self) -> bool:
        """True where what stands before the ``=`` is more than one variable: ``2x + 4y - 3 = 0`` may be an equation."""
        return bool(self.name) and not _VARIABLE.fullmatch(self.name)

    def equals(self, other: Quantity) -> bool:
        """Compare; a percentage equals its number and a hundredth of it, so 50% is 50 and 0.5."""
        if self.name and other.name and self.name != other.name:
            return False
        pairs = [(self.value, other.value)]
        if self.is_percent and not other.is_percent:
            pairs.append((self.value / 100, other.value))
        elif other.is_percent and not self.is_percent:
            pairs.append((self.value, other.value / 100))
        if self.is_rounded or other.is_rounded:
            return any(is_near(mine, theirs) for mine, theirs in pairs)
        return any(mine == theirs for mine, theirs in pairs)


def is_near(first: Fraction, second: Fraction) -> bool:
    """Tell whether two values agree to six decimals, and to about five digits."""
    gap = abs(first - second)
    return gap <= ABSOLUTE_TOLERANCE and gap <= RELATIVE_TOLERANCE * max(abs(first), abs(second))


_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d{1,3}(?:'\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d+)(?!\d)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d+|\.(?!\s*\w))?|\.\d+)(?!\d)"
_CURRENCY = r"(?:\\\$|[€£¥₹₩₽]|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CAD|AUD|HKD|CHF|SGD|Rs\.?)(?![A-Za-z]))"
_ABOUT = r"(?:approximately|about|roughly|exactly|大约|约)"
_QUANTITY = re.compile(
    rf"(?:{_ABOUT}\s*)?(?P<sign>[+-]?)\s*(?:{_CURRENCY}\s*)?(?P<sign_after>[+-]?)\s*"
    rf"(?:(?P<mixed>{_WHOLE})\s+(?P<part>\d+)\s*/\s*(?P<parts>\d+)(?!\d)"
    rf"|(?P<above>{_DECIMAL})\s*/\s*(?P<below>{_DECIMAL})"
    r"|(?P<fixed>\d*\.\d*)\\(?:overline|bar|dot)\s*\{?\s*(?P<repeating>\d+)\s*\}?"
    rf"|(?:(?P<mantissa>{_DECIMAL})\s*(?:\\times|[·*xX])\s*)?10\s*\^\s*"
    r"(?:\{\s*(?P<braced>[+-]?\d{1,3})\s*\}|(?P<bare>\d))"
    rf"|(?P<digits>{_DECIMAL})[eE](?P<exponent>[+-]?\d{{1,3}})(?![\dA-Za-z])"
    rf"|(?P<plain>{_DECIMAL}))"
    r"(?P<rest>.*)",
    re.ASCII | re.DOTALL,
)
_NEGATIVE = re.compile(r"(?:negative|minus)\s+(?=[\d.\\])", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER_ARGUMENT = r"\s*(?:\{\s*([+-]?[\d.,]+)\s*\}|(\d))"
_FRACTION = re.compile(rf"(?P<after_digit>(?<=[\d.])\s*)?\\frac{_NUMBER_ARGUMENT}{_NUMBER_ARGUMENT}", re.ASCII)
_BRACED = re.compile(r"(?<![\^_A-Za-z}\]])\{([^{}\\]*)\}")
_ORDINAL = re.compile(r"\^\s*\{\s*(st|nd|rd|th)\s*\}")
_UPRIGHT_LETTER = re.compile(r"(?<=[\d\s}])\\text\s*\{\s*[ACFHJKNSTVWΩ]\s*\}")
"""A unit such as newton: ``5 \\mathrm{N}``, where ``5 N`` is a product."""
_UNIT_FRACTION = re.compile(
    r"\\frac\s*\{\s*(\\text\s*\{[^{}]*\})\s*\}\s*\{\s*(\\text\s*\{[^{}]*\}(?:\s*\^\s*\d)?)\s*\}"
)
_PERCENT = re.compile(r"\s*(?:%|per\s?cent(?:age(?: points?)?)?(?![A-Za-z])|pct(?![A-Za-z]))", re.IGNORECASE)
_DEGREE = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?\s*[CFK]?(?![A-Za-z])")
_MONEY = re.compile(_CURRENCY)
_GROUPING = re.compile("[ ,']")

_SEPARATOR = re.compile(r"\\approx(?![A-Za-z])|=")
_VARIABLE = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{\w+\}))?")
_NO_LEFT_SIDE = re.compile(
    r"\\(?:neq|leq|geq|in|pm|ldots|sim|equiv)(?![A-Za-z])|\\\\|[<>;:?\t]|,(?!\d{3}(?!\d))|(?<![A-Za-z\\])"
    r"(?:or|if|when|where|unless|not|but|for|with|since|because|except|that|than|least|most)(?![A-Za-z])",
    re.IGNORECASE,
)
_AND = re.compile(r"(?<![A-Za-z])and(?![A-Za-z])", re.IGNORECASE)
_LONE_LETTER = re.compile(rf"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|\\(?:{'|'.join(GREEK)})(?![A-Za-z])")


@dataclass(frozen=True)
class Equation:
    """A text, split at its ``=``; the sides are "" where there is none."""

    name: str
    """The text before the first ``=``."""
    left: str
    """The text before the last ``=``."""
    right: str
    """The text after the last ``=``; the whole text where there is none."""


def read_quantity(text: str) -> Quantity | None:
    """Read a text as one quantity, after the last ``=`` where there is one; None if it is none."""
    if _INTEGER.fullmatch(text):  # what most answers are
        return Quantity(Fraction(text))
    equation = split_equation(text)
    quantity = _read_one(_flatten(equation.right)) if equation is not None else None
    if quantity is None or equation is None or not _LONE_LETTER.search(without_wrappers(equation.name)):
        return quantity
    return replace(quantity, name=equation.name)


def split_equation(text: str) -> Equation | None:
    r"""Split at ``=`` and ``\approx`` outside brackets; None if what stands before them is no left side.

    A left side names the value or computes it: ``x``, ``P(X = 3)``, ``5 \text{ km} + 6 \text{ km}``. Lists, conditions and
    other relations are none: ``x = 5, y``.
    """
    if "=" not in text and r"\approx" not in text:
        return Equation("", "", text)
    outline = top_level(without_wrappers(text))
    separators = [match.span() for match in _SEPARATOR.finditer(outline)]
    if not separators:
        return Equation("", "", text)
    left = outline[: separators[-1][0]]
    if _NO_LEFT_SIDE.search(left):
        return None
    if _AND.search(left) and (len(separators) > 1 or _LONE_LETTER.search(left)):
        return None  # x = 5 and y = 6; but 1 hour and 30 minutes = 90 minutes
    return Equation(
        text[: separators[0][0]].strip(), text[: separators[-1][0]].strip(), text[separators[-1][1] :].strip()
    )


def _flatten(text: str) -> str:
    r"""Take the LaTeX out of a number with a unit: ``2\frac{1}{2}\text{ cups}`` becomes ``2 1/2  cups ``."""
    text = without_wrappers(_UPRIGHT_LETTER.sub(" units ", _UNIT_FRACTION.sub(r"\1/\2", text)))
    if "\\" in text or "{" in text:
        text = _ORDINAL.sub(r" \1", text)
        text = _FRACTION.sub(_slash_fraction, text)
        text = _BRACED.sub(r"\1", text)
        text = text.replace("\\cdot", "·").replace("\\mu", "μ").replace("\\Omega", "Ω")
    text = text.strip()
    while len(text) > 1 and text[0] == "(" and text[-1] == ")" and "(" not in text[1:]:
        text = text[1:-1].strip()
    return text


def _slash_fraction(match: re.Match[str]) -> str:
    blank = " " if match["after_digit"] is not None else ""
    return f"{blank}{match[2] or match[3]}/{match[4] or match[5]} "


def _read_one(text: str) -> Quantity | None:
    text = _NEGATIVE.sub("-", text, count=1)
    match = _QUANTITY.fullmatch(text)
    if match is None or (match["sign"] and match["sign_after"]):
        return None
    value = _value(match)
    if value is None:
        return None
    rest = match["rest"]
    while (scaled := leading_scale(rest)) is not None:
        scale, rest = scaled
        value *= scale
    rest, is_percent = _PERCENT.subn("", rest, count=1) if _PERCENT.match(rest) else (rest, 0)
    rest = _DEGREE.sub("", rest, count=1) if _DEGREE.match(rest) else rest
    money = _MONEY.match(rest.lstrip())
    rest = rest.lstrip()[money.end() :] if money else rest
    if not is_unit(rest):
        return None
    is_negative = "-" in (match["sign"], match["sign_after"])
    is_rounded = "." in text[: match.start("rest")] and not match["repeating"]
    return Quantity(-value if is_negative else value, is_percent=bool(is_percent), is_rounded=is_rounded)


def _value(match: re.Match[str]) -> Fraction | None:
    """Compute the number without its sign; None for an improper mixed number and for a division by zero."""
    if match["mixed"]:
        part, parts = int(match["part"]), int(match["parts"])
        return _fraction(match["mixed"]) + Fraction(part, parts) if part < parts else None
    if match["above"]:
        below = _fraction(match["below"])
        return _fraction(match["above"]) / below if below else None
    if match["repeating"]:
        whole, _, fixed = match["fixed"].partition(".")
        once, places = int((whole + fixed) or "0"), len(match["repeating"])
        repeated = int(whole + fixed + match["repeating"])
        return Fraction(repeated - once, (10**places - 1) * 10 ** len(fixed))
    if match["digits"]:
        return _fraction(match["digits"]) * Fraction(10) ** int(match["exponent"])
    if match["plain"]:
        return _fraction(match["plain"])
    power = Fraction(10) ** int(match["braced"] or match["bare"])
    return power * _fraction(match["mantissa"]) if match["mantissa"] else power


def _fraction(number: str) -> Fraction:
    return Fraction(_GROUPING.sub("", number).rstrip("."))
