"""Quantities: the exact value of a number with a unit, and what is none."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_rl.rewards.notation import normalise
from megatron_rl.rewards.quantity import Quantity, read_quantity


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-$1,234.50 per month", Quantity(Fraction(-2469, 2), is_rounded=True)),
        ("1\N{THIN SPACE}234\N{NARROW NO-BREAK SPACE}567", Quantity(Fraction(1234567))),
        ("12,34,567", Quantity(Fraction(1234567))),
        ("11 5/6", Quantity(Fraction(71, 6))),
        ("-2\N{VULGAR FRACTION ONE HALF}", Quantity(Fraction(-5, 2))),
        (r"0.1\overline{6}", Quantity(Fraction(1, 6))),
        (r"1.5 \times 10^{-3}\text{ m}", Quantity(Fraction(3, 2000), is_rounded=True)),
        ("2.5e3", Quantity(Fraction(2500), is_rounded=True)),
        ("3 hundred thousand dollars", Quantity(Fraction(300_000))),
        ("1.2亿元", Quantity(Fraction(120_000_000), is_rounded=True)),
        (r"50\%", Quantity(Fraction(50), is_percent=True)),
        (r"37^\circ\text{C}", Quantity(Fraction(37))),
        ("x = 5 km", Quantity(Fraction(5), name="x")),
        (r"a + b = 5", Quantity(Fraction(5), name="a + b")),
        (r"\frac{20}{4} = 5", Quantity(Fraction(5))),
        (r"\text{Area} = 5", Quantity(Fraction(5))),
    ],
)
def test_value(text: str, expected: Quantity) -> None:
    assert read_quantity(normalise(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "-", "4 10/3", "1/0", "12,34", "1, 234", "5 6", "5x", "5 x", "5 a", "5(m)", "5k", "0x5", "5 or more", "5^2",
        "5!", "1e5000", "x", "x = y", "x = 5, y", "x > 3 = 3", "5 if x = 6", "1\N{SUPERSCRIPT TWO}",
        "\N{ARABIC-INDIC DIGIT SEVEN}",
    ],
)  # fmt: skip
def test_what_is_no_quantity(text: str) -> None:
    assert read_quantity(normalise(text)) is None


def test_only_decimals_are_compared_with_a_tolerance() -> None:
    third, decimal = Quantity(Fraction(1, 3)), Quantity(Fraction(333333, 10**6), is_rounded=True)
    assert third.equals(decimal) and decimal.equals(third)
    assert not third.equals(Quantity(decimal.value))


def test_percentage_is_its_number_and_a_hundredth_of_it() -> None:
    half = Quantity(Fraction(50), is_percent=True)
    assert half.equals(Quantity(Fraction(1, 2))) and Quantity(Fraction(50)).equals(half)
    assert not half.equals(Quantity(Fraction(1, 2), is_percent=True))


def test_variables_of_two_names_differ() -> None:
    five = Quantity(Fraction(5), name="x")
    assert five.equals(Quantity(Fraction(5))) and not five.equals(Quantity(Fraction(5), name="y"))
