r"""One spelling of an answer's text: LaTeX without layout, whether it came as LaTeX, Unicode, ASCII or Markdown.

    ``**½ \text{ cup}**``   becomes   ``\frac{1}{2} \text{ cup}``
    ``\left(2,\;3\right)``  becomes   ``(2, 3)``
    ``x ≤ √2``              becomes   ``x \leq \sqrt{2}``

``quantity`` reads numbers from this form, ``engine`` hands it to math-verify. Every pass is linear in the text.
"""
# ruff: noqa: RUF001 - look-alikes of ASCII are what this file maps to ASCII

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

WIDE = "\t"
"""The blank that stands for ``\\quad``: it separates answers, where a plain blank may separate thousands."""

_TEXT_COMMANDS = (
    "text textbf textit textrm textsf texttt textnormal textup mathrm mathbf mathit mathsf mathtt mathnormal mbox hbox "
    "operatorname boldsymbol bm emph underline"
)
_LAYOUT_COMMANDS = (
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle scriptstyle "
    "tiny small normalsize large Large LARGE huge Huge bf rm it limits nonumber negthinspace boxed fbox"
)
_COMMANDS = {
    **dict.fromkeys(_TEXT_COMMANDS.split(), r"\text"),
    **dict.fromkeys(_LAYOUT_COMMANDS.split(), ""),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"),
    **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb", "ldots"), r"\ldots"),
    "varnothing": r"\emptyset",
    **dict.fromkeys(("le", "leqslant"), r"\leq"),
    **dict.fromkeys(("ge", "geqslant"), r"\geq"),
    **dict.fromkeys(("lvert", "rvert", "vert"), "|"),
    **dict.fromkeys(("lor", "vee"), r"\text{ or }"),
    **dict.fromkeys(("land", "wedge"), r"\text{ and }"),
    **dict.fromkeys(("degree", "degrees"), r"^\circ"),
    **dict.fromkeys(("enspace", "thinspace", "medspace", "thickspace"), " "),
    **dict.fromkeys(("quad", "qquad"), WIDE),
    **{"ne": r"\neq", "lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "colon": ":"},
}  # fmt: skip
_SYMBOLS = {**dict.fromkeys(",;:> ", " "), **dict.fromkeys("()[]", ""), "%": "%"}
"""The character after a backslash -> what both become."""

_SMALL_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho varsigma sigma tau upsilon phi "
    "chi psi omega"
)  # in the order of Unicode
_CAPITAL_GREEK = "gamma delta theta lambda xi pi sigma phi psi"
GREEK = tuple(_SMALL_GREEK.split())
"""Names of the small letters."""
_CHARACTERS: dict[int, str] = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
    **{code: " " for code in (0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)},
    **{code: "" for code in (0xAD, *range(0x200B, 0x2010), *range(0x2060, 0x2065), 0xFEFF)},
    **{code: "-" for code in (0x2212, 0xFE63)},
    **{0x3B1 + index: f"\\{name} " for index, name in enumerate(GREEK)},
    **{0x391 + GREEK.index(name): f"\\{name.title()} " for name in _CAPITAL_GREEK.split()},
    **{ord(char): ", " for char in "，、"},
    **{ord(char): f"\\{name} " for char, name in (
        ("×", "times"), ("÷", "div"), ("⋅", "cdot"), ("∙", "cdot"), ("≤", "leq"), ("⩽", "leq"), ("≥", "geq"), ("⩾", "geq"),
        ("≠", "neq"), ("≈", "approx"), ("∞", "infty"), ("∪", "cup"), ("∩", "cap"), ("∈", "in"), ("∅", "emptyset"),
        ("±", "pm"), ("√", "sqrt"), ("…", "ldots"), ("⋯", "ldots"),
    )},
    **{ord(char): "'" for char in "’ʼ′"},
    **{ord("°"): r"^\circ ", ord("℃"): r"^\circ C", ord("℉"): r"^\circ F", ord("￥"): "¥", ord("￡"): "£"},
    **{ord(char): "/" for char in "⁄∕"},
}  # fmt: skip
for _code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F)):  # the characters ¼ to ⅞
    _above, _, _below = unicodedata.normalize("NFKC", chr(_code)).partition("⁄")
    _CHARACTERS[_code] = rf"\frac{{{_above}}}{{{_below}}}"
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_LOWERED_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_LEADING_DASH = re.compile(r"^[‒–—](?=\s*[\d.\\$])")
_PIECE = re.compile(
    r"\\(?:left|right)\s*\.|\\!\s*|(?P<unequal>\\not\s*=|(?<![\d)\]}!])!=)|\\(?P<name>[A-Za-z]+)\*?|\\(?P<symbol>.)"
    r"|(?P<relation>[<>]=|==|~=)|(?P<dots>\.\.\.)"
    r"|(?P<money>(?<![A-Za-z])(?:US|HK|NT|CA|AU|NZ|SG)\s?\\?\$)|(?P<dropped>\$)|(?P<tie>~)"
)
_RELATIONS = {"<=": r"\leq ", ">=": r"\geq ", "==": "=", "~=": r"\approx "}
_BRACED_COMMA = re.compile(r"\{\s*,\s*\}")
_BARE_ROOT = re.compile(r"\\sqrt\s+(?=[\d({])(\d+)?")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_AROUND = "*` \t"
_BRACKETS = re.compile(r"\\.|[()\[\]{}]")


def normalise(text: str) -> str:
    r"""Return the one spelling of a text; ``\text{...}`` still tells words from products of letters."""
    if not text.isascii():
        text = _LEADING_DASH.sub("-", text.strip(" *$"))
        text = _RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
        text = _LOWERED_RUN.sub(lambda run: f"_{{{run[0].translate(_LOWERED)}}}", text)
        text = text.translate(_CHARACTERS)
    text = _PIECE.sub(_respell, " ".join(text.split()))
    text = _BRACED_COMMA.sub(",", text)
    text = _BARE_ROOT.sub(lambda root: rf"\sqrt{{{root[1]}}}" if root[1] else r"\sqrt", text)
    text = text.strip(_AROUND).rstrip(".,;。").strip(_AROUND)
    while text.startswith("{") and closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _respell(piece: re.Match[str]) -> str:
    if piece["name"]:
        return _COMMANDS.get(piece["name"], piece[0])
    if piece["symbol"]:
        return _SYMBOLS.get(piece["symbol"], piece[0])
    if piece["unequal"]:
        return r"\neq "
    if piece["relation"]:
        return _RELATIONS[piece["relation"]]
    if piece["money"]:
        return r"\$"
    if piece["dots"]:
        return r"\ldots "
    return " " if piece["tie"] else ""


def closes_at_end(text: str) -> bool:
    """Tell whether the last character closes the bracket that the first one opens."""
    return next((start for start, depth in _depths(text) if depth == 0), None) == len(text) - 1


def _depths(text: str) -> Iterator[tuple[int, int]]:
    r"""Yield the place of each bracket and the depth after it; an interval's ``[2, 5)`` closes as well."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        if match[0][-1] in "([{":
            depth += 1
        elif match[0][-1] in ")]}":
            depth -= 1
        else:
            continue
        yield match.end() - 1, depth


def max_depth(text: str) -> int:
    """Return how deep brackets nest, closed or not."""
    return max((depth for _, depth in _depths(text)), default=0)


def top_level(text: str) -> str:
    """Return the text with everything inside brackets blanked, each character at its place."""
    pieces: list[str] = []
    start = depth = 0
    for place, depth_after in _depths(text):
        pieces.append(text[start:place] if depth == 0 else " " * (place - start))
        start, depth = place, max(depth_after, 0)
    pieces.append(text[start:] if depth == 0 else " " * (len(text) - start))
    return "".join(pieces)


def without_wrappers(text: str) -> str:
    r"""Return the text with blanks for each ``\text{`` and its ``}``, each other character at its place."""
    for _ in range(3):  # as deep as they nest
        text, found = _TEXT.subn(lambda match: f"{' ' * (match.start(1) - match.start())}{match[1]} ", text)
        if not found:
            break
    return text
