"""Words after a number: units, which name what is counted, and scales, which multiply it."""

from __future__ import annotations

import re
from fractions import Fraction

_FACTORS = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9,
    "trillion": 10**12, "百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip
_PARTS = {
    "halves": 2, "thirds": 3, "fourths": 4, "fifths": 5, "sixths": 6, "sevenths": 7, "eighths": 8, "ninths": 9, "tenths": 10,
    "hundredths": 100, "thousandths": 1000, "millionths": 10**6,
}  # fmt: skip
"""Quarters are missing: they are coins and parts of a year as often as fourths."""
_SCALES = {
    **{word: Fraction(factor) for word, factor in _FACTORS.items()},
    **{f"{word}s": Fraction(factor) for word, factor in _FACTORS.items() if word.isascii()},
    **{word: Fraction(1, parts) for word, parts in _PARTS.items()},
}
_SCALE = re.compile(
    rf"\s*(?:({'|'.join(word for word in _SCALES if word.isascii())})(?![A-Za-z])|([百千万萬亿億]))", re.IGNORECASE
)

_ZERO_TO_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBER_WORDS = tuple(_ZERO_TO_TWENTY.split())
"""Words of the numbers 0 to 20."""
_CHANGE_NUMBERS = (
    "thirty forty fifty sixty seventy eighty ninety tens half double doubled halved tripled twice thrice negative least most "
    "and or nor to by plus minus over divided mod modulo pmod pi sqrt root infinity sin cos tan cot sec csc log ln lg exp lim "
    "factorial choose if when where unless not but except otherwise is isn are was no vs percent abc xyz"
)
_NO_UNITS = frozenset([*_CHANGE_NUMBERS.split(), *NUMBER_WORDS, *_SCALES])
"""Words that multiply or change a number, or say something about it, instead of naming what is counted."""
_NOT_FIRST = frozenset({"squared", "cubed", "a", "an", "the"})
"""``5 squared`` is 25, ``5 meters squared`` an area; ``5 a`` is a product, ``5 dollars a day`` a rate."""
_NOT_LAST = frozenset({"half", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "hundredth"})
"""``1 third`` is a fraction, ``5 third graders`` are children."""
_TIMES_GO_WITH = frozenset({"", "as", "more", "a", "per", "each", "the"})
"""``5 times`` and ``5 times as many``, but not ``5 times pi``."""
_OF_TWO_LETTERS = (
    "am pm cm mm km dm nm kg mg ml cl dl ft in lb oz yd mi hr ms ns hz kw kv ev cc gb mb kb tb sq cu st nd rd th pt qt ha of "
    "pa kj kn kc mw kr rs bp"
)
_TWO_LETTERS = frozenset(_OF_TWO_LETTERS.split())
"""Other first words of two letters are products of variables: ``5 ab``."""
_LETTERS = frozenset("dghlmsL")
"""Units of one letter after a blank: ``5 x`` is a product."""
_LETTERS_WITHOUT_BLANK = frozenset("ghlmsL")
_LETTERS_IN_COMPOUNDS = _LETTERS | frozenset("aACFHJKNSTVWΩ")
_NO_CJK_UNIT = re.compile("[或和到至与且又分半不非余多以大小若当零一二三四五六七八九十百千万亿成折]")
"""Characters that change a number (``5或6``, ``5分之1``, ``5以上``)."""

_WORD = r"(?:[A-Za-zµμΩÅ]+\.?|[\u3005\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]+)"
_POWER = r"(?:\s*\^\s*\{?-?[1-4]\}?|(?<=m)[23](?![\w.]))?"
_JOINT = r"(?:\s*[-'/·*]\s*|\s+)"
_UNIT = re.compile(
    rf"\s*(?:(?:/|per\b)\s*)?(?P<words>{_WORD}{_POWER}(?:{_JOINT}{_WORD}{_POWER})*)?'?"
    r"(?P<remark>\s*\(\s*[A-Za-z][A-Za-z .'-]*\))?\s*|\s*(?P<mark>'{1,2}|\")\s*"
)
_CLOCK = re.compile(r"\s*[ap]\.?\s?m\.?\s*", re.IGNORECASE)
_WORDS = re.compile(r"[^\W\d_]+")


def leading_scale(text: str) -> tuple[Fraction, str] | None:
    """Take one scale word off the front: (factor, the text after it)."""
    match = _SCALE.match(text)
    return (_SCALES[(match[1] or match[2]).lower()], text[match.end() :]) if match else None


def is_unit(text: str) -> bool:
    """Tell whether what follows a number names what is counted: ``km/h``, ``students' books``, ``个``, or nothing."""
    if not text or text.isspace() or _CLOCK.fullmatch(text):
        return True
    match = _UNIT.fullmatch(text)
    if match is None:
        return False
    if match["mark"]:
        return True
    remark = _WORDS.findall(match["remark"] or "")
    if min(map(len, remark), default=3) < 3 or not _are_units(remark, allowed=NUMBER_WORDS):
        return False  # 5 (five) is 5, but 5(m) a product
    if not match["words"]:
        return not text.lstrip().startswith("/")
    words = _WORDS.findall(match["words"])
    if len(words[0]) == 1 and words[0].isascii() and not _is_letter_unit(words[0], text):
        return False
    if len(words[0]) == 2 and words[0].isascii() and words[0].lower() not in _TWO_LETTERS:
        return False
    if words[0].lower() in _NOT_FIRST or words[-1].lower() in _NOT_LAST:
        return False
    return _are_units(words)


def _are_units(words: list[str], *, allowed: tuple[str, ...] = ()) -> bool:
    for word, following in zip(words, [*words[1:], ""]):
        lower = word.lower()
        if lower in _NO_UNITS and lower not in allowed:
            return False
        if lower == "times" and following.lower() not in _TIMES_GO_WITH:
            return False
        if _NO_CJK_UNIT.search(word):
            return False
        if len(word) == 1 and word.isascii() and word not in _LETTERS_IN_COMPOUNDS:
            return False
    return True


def _is_letter_unit(letter: str, text: str) -> bool:
    """Judge a first word of one letter, alone or in a compound such as ``N/C``."""
    stripped = text.strip()
    if len(stripped) > 1 and re.match(r"[A-Za-z]\s*[/·]", stripped):
        return letter in _LETTERS_IN_COMPOUNDS
    return letter in (_LETTERS if text[0].isspace() or text[0] == "/" else _LETTERS_WITHOUT_BLANK)
