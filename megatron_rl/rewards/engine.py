"""math-verify as the engine for all that is not a plain number, with guards against what it takes for equal."""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from megatron_rl.rewards.notation import max_depth
from megatron_rl.rewards.quantity import Quantity

if TYPE_CHECKING:
    from sympy import Basic, Expr

MAX_DIGITS = 100_000
"""Numbers with more digits than this before or after the point are not computed, and so equal nothing but their own text."""
RELATIVE_TOLERANCE = 5e-6
"""The same as in ``quantity``, for terms with decimals. math-verify's own tolerance is absolute."""
MAX_DEPTH = 30
"""Formulas with brackets nested deeper are not parsed: the parser takes seconds for a few hundred."""
_PROOF_DIGITS = 200
"""Two exact numbers whose difference shows within this many digits are different: 1 and 1 - 1/2^99."""


def parse_formula(latex: str) -> Any | None:
    """Parse all of a formula; None where it is none. Unlike math-verify's own search, it never takes a number out of a text."""
    if max_depth(latex) > MAX_DEPTH:
        return None
    found = _math_verify().parse(
        f"\\boxed{{{latex}}}", _formula_config(), fallback_mode="no_fallback", parsing_timeout=None
    )
    return found[0] if found else None


def find_last(text: str) -> list[Any]:
    """Find the last expression of a text, as math-verify does: sympy objects and strings, none to a few."""
    found: list[Any] = _math_verify().parse(text, parsing_timeout=None)
    return found


def verify(reference: Any, found: Any) -> bool:
    """Compare as math-verify does."""
    return bool(_math_verify().verify(reference, found, timeout_seconds=None))


def as_numbers(quantity: Quantity) -> list[Any]:
    """Return a quantity as sympy numbers: a float where it was rounded; a percentage is two numbers, 50 and 0.5."""
    from sympy import Float, Rational

    values = [quantity.value, quantity.value / 100] if quantity.is_percent else [quantity.value]
    numbers = [Rational(value.numerator, value.denominator) for value in values]
    return [Float(number, 30) for number in numbers] if quantity.is_rounded else numbers


def only_number(expression: Any) -> list[Any]:
    """Return the number that an expression is, or that is its only element, in a list; [] where there is none.

    The parser makes ``i`` a variable: where it is the only one, it is the imaginary unit.
    """
    from sympy import Expr, FiniteSet, I

    if isinstance(expression, FiniteSet) and len(expression.args) == 1:
        expression = expression.args[0]
    if not isinstance(expression, Expr):
        return []
    variables = expression.free_symbols
    if [symbol.name for symbol in variables] == ["i"]:
        return [expression.subs(variables.pop(), I)]
    return [] if variables else [expression]


def is_rounded(exact: Any, rounded: Any, num_decimals: int) -> bool:
    """Tell whether ``rounded`` is ``exact`` rounded to, or cut after, a number of decimals; both are numbers."""
    if is_too_large(exact) or is_too_large(rounded):
        return False
    exact, rounded = exact.evalf(30), rounded.evalf(30)
    gap = (abs(exact - rounded) * 10**num_decimals).evalf()
    if not gap.is_finite:
        return False
    return bool(gap <= 0.5) or bool(gap < 1 and abs(rounded).evalf() < abs(exact).evalf())


def equal(reference: Any, found: Any) -> bool:
    """Compare as math-verify does, after terms that differ at their own scale, or are too large, have been sorted out."""
    if is_too_large(reference) or is_too_large(found) or _differ(reference, found):
        return False
    return verify([reference], [found]) and _members_agree(reference, found)


def _is_number(expression: Any) -> bool:
    from sympy import Expr

    return isinstance(expression, Expr) and not expression.free_symbols


def _members_agree(reference: Any, found: Any) -> bool:
    """Tell whether each number of a set or tuple has one near it in the other, which math-verify saw to be equal."""
    from sympy import FiniteSet, Interval, MatrixBase, Tuple

    if not isinstance(reference, FiniteSet | Tuple | Interval | MatrixBase) or type(reference) is not type(found):
        return True
    ours, theirs = list(_members(reference)), list(_members(found))
    if not all(map(_is_number, [*ours, *theirs])):
        return True
    return all(any(not _differ(one, other) for other in theirs) for one in ours)


def _members(container: Any) -> Any:
    from sympy import MatrixBase

    return container.flat() if isinstance(container, MatrixBase) else container.args


def _differ(first: Any, second: Any) -> bool:
    """Tell whether two terms are certainly different: by any gap if they are exact, else by a gap relative to their size.

    Variables take a value each: terms that differ there need no search for an identity.
    """
    from sympy import Add, Expr, Float, Integral, Max, Product, Sum, oo

    if first == second or not isinstance(first, Expr) or not isinstance(second, Expr):
        return False
    try:
        if first.has(Integral, Sum, Product) or second.has(Integral, Sum, Product):
            return False
        first, second = _at_a_point(first, second)
        if first.has(Float) or second.has(Float):
            one, other = first.evalf(30), second.evalf(30)
            return bool(abs(one - other).evalf() > RELATIVE_TOLERANCE * Max(abs(one), abs(other)).evalf())
        if first.has(oo) or second.has(oo):
            return {first.evalf().is_finite, second.evalf().is_finite} == {True, False}
        gap = Add(first, -second).evalf(15, maxn=_PROOF_DIGITS)
        return any(part.is_Float and part._prec > 1 and part != 0 for part in gap.as_real_imag())
    except Exception:  # terms without a value: math-verify decides
        return False


def _at_a_point(first: Expr, second: Expr) -> tuple[Expr, Expr]:
    """Replace variables of one name by the same fraction, and what the parser left unevaluated (percent) by its value."""
    from sympy import Rational, UnevaluatedExpr

    names = sorted({symbol.name for symbol in first.free_symbols | second.free_symbols})
    numbers = {name: Rational(2 * index + 7, index + 5) for index, name in enumerate(names)}

    def at_point(term: Expr) -> Expr:
        values = {symbol: numbers[symbol.name] for symbol in term.free_symbols}
        return term.xreplace({part: part.args[0] for part in term.atoms(UnevaluatedExpr)}).xreplace(values)

    return at_point(first), at_point(second)


def is_too_large(expression: Any) -> bool:
    """Tell whether powers or factorials make a number of more than MAX_DIGITS digits; reads the formula, computes nothing."""
    try:
        _num_digits(expression)
    except OverflowError:
        return True
    return False


def _num_digits(expression: Basic) -> float:
    """Bound log10 of an expression's size; variables count as 1.

    Raises:
        OverflowError: a part has more than MAX_DIGITS digits.
    """
    from sympy import Add, Float, Mul, Pow, Rational, factorial

    if isinstance(expression, Rational):
        return max(expression.p.bit_length(), expression.q.bit_length()) * math.log10(2)
    if isinstance(expression, Float):
        _, _, exponent, num_bits = expression._mpf_
        return abs(exponent + num_bits) * math.log10(2)
    parts = [_num_digits(part) for part in getattr(expression, "args", ())]
    if not parts:
        return 1.0
    if isinstance(expression, Pow | factorial):
        power = expression.args[-1]
        size = parts[-1] if not isinstance(power, Rational) else math.log10(abs(power.p) + 1) - math.log10(power.q)
        digits = max(parts[0], 0.5) * 10 ** min(size, 12.0)
    elif isinstance(expression, Mul):
        digits = sum(parts)
    else:
        digits = max(parts) + (math.log10(len(parts)) if isinstance(expression, Add) else 0.0)
    if digits > MAX_DIGITS:
        raise OverflowError
    return digits


@lru_cache(maxsize=1)
def _formula_config() -> list[Any]:
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig

    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    return [
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=spelling)
    ]


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    """Import the module at its first use: it takes half a second, which reading a problem file need not pay.

    Its own time limits are switched off in every call: they use ``signal.alarm``, which works in the main thread only and
    not in C code that never looks for signals. It warns of that in every process, hence the log level.
    """
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
