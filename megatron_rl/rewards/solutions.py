r"""Solution sets in one variable: ``x < 3``, ``m \in [2, \infty)``, ``x < 1 \text{ or } x > 3`` and plain intervals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce
from typing import Any

from megatron_rl.rewards import engine
from megatron_rl.rewards.formula import as_latex

_BUILDER = re.compile(
    r"\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?:\\mid|\\vert|[|:])(?P<condition>.*)\\\}", re.DOTALL
)
_OR = re.compile(r"\\text\s*\{\s*,?\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])")
_AND = re.compile(r"\\text\s*\{\s*,?\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])")


@dataclass(frozen=True)
class Solutions:
    """A set of real numbers."""

    variable: str
    """The variable that has these values; "" for a bare interval or set."""
    values: Any
    """A sympy Set."""


def solutions(text: str) -> Solutions | None:
    """Read a text as the set of values of one variable; None if it is none, or not linear in the variable."""
    builder = _BUILDER.fullmatch(text)
    text = builder["condition"] if builder else text
    try:
        return _combined([_all_of(part) for part in _OR.split(text)], lambda one, other: one.union(other))
    except (AttributeError, NotImplementedError, TypeError, ValueError):  # bounds that sympy cannot order
        return None


def _all_of(text: str) -> Solutions | None:
    found = [_one(engine.parse_formula(as_latex(part))) for part in _AND.split(text)]
    return _combined(found, lambda one, other: one.intersect(other))


def _combined(found: list[Solutions | None], combine: Any) -> Solutions | None:
    known = [one for one in found if one is not None]
    names = {one.variable for one in known if one.variable}
    if len(known) < len(found) or len(names) > 1:
        return None
    return Solutions("".join(names), reduce(combine, [one.values for one in known]))


def _one(expression: Any) -> Solutions | None:
    """Read an inequality between a symbol and numbers, a chain of two, a membership, or a set."""
    from latex2sympy2_extended.logic import And
    from sympy import Eq, Set, Symbol
    from sympy.core.relational import Relational

    if isinstance(expression, Set):
        return None if expression.free_symbols else Solutions("", expression)
    if isinstance(expression, And):
        return _combined([_one(part) for part in expression._unsorted_args], lambda one, other: one.intersect(other))
    if isinstance(expression, Eq) and isinstance(expression.lhs, Symbol) and isinstance(expression.rhs, Set):
        return None if expression.rhs.free_symbols else Solutions(expression.lhs.name, expression.rhs)
    if isinstance(expression, Relational):
        return _half_line(expression)
    return None


def _half_line(relation: Any) -> Solutions | None:
    from sympy import Eq, FiniteSet, GreaterThan, Interval, LessThan, Ne, StrictGreaterThan, Symbol, oo

    if isinstance(relation.rhs, Symbol) and not relation.lhs.free_symbols:
        relation = relation.reversed
    if not isinstance(relation.lhs, Symbol) or getattr(relation.rhs, "free_symbols", True):
        return None
    bound = relation.rhs
    if engine.is_too_large(bound) or not bound.is_extended_real:
        return None
    if isinstance(relation, Eq | Ne):
        values = FiniteSet(bound) if isinstance(relation, Eq) else Interval.open(-oo, bound) | Interval.open(bound, oo)
    elif isinstance(relation, GreaterThan | StrictGreaterThan):
        values = Interval(bound, oo, left_open=not isinstance(relation, GreaterThan))
    else:
        values = Interval(-oo, bound, right_open=not isinstance(relation, LessThan))
    return Solutions(relation.lhs.name, values)
