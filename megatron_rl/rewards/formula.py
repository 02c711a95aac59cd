r"""Formulas: from the one spelling of ``notation`` to what math-verify's parser reads without misreading it.

    ``2*sqrt(3)/3``          becomes   ``2*\sqrt{3}/3``
    ``25\pi\text{ cm}^2``    becomes   ``25\pi``
    ``14.0 + -1.0i``         becomes   ``14.0 - 1.0 i``
    ``\sin 30^\circ``        becomes   ``\sin (30\pi/180)``

The parser would read ``pi`` as a product, take units for variables, and drop degree signs.
"""

from __future__ import annotations

import re

from megatron_rl.rewards.notation import GREEK, top_level, without_wrappers
from megatron_rl.rewards.units import is_unit

_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
_ARCS = tuple(f"arc{name}" for name in _TRIGONOMETRIC)
_FUNCTIONS = (
    *_ARCS,
    "sinh",
    "cosh",
    "tanh",
    *_TRIGONOMETRIC,
    "sqrt",
    "exp",
    "log",
    "ln",
    "lg",
    "gcd",
    "lcm",
    "max",
    "min",
)
_NAMES = {
    **{name: f"\\{name} " for name in (*_FUNCTIONS, *GREEK, "Theta", "Delta", "Omega")},
    **dict.fromkeys(("infinity", "inf", "oo"), r"\infty "),
}
"""ASCII names that are LaTeX commands."""
_FUSED = re.compile(rf"({'|'.join(_FUNCTIONS)}|pi)([a-zA-Z])")
"""``sinx`` and ``pir``; a longer run of letters is a word."""

_UNIT = re.compile(r"(?<=[\d)}\]A-Za-z])\s*\\text\s*\{(?P<unit>[^{}]*)\}(?:\s*\^\s*(?:\d|\{\s*-?\d\s*\}))?")
_BARE_UNIT = re.compile(r"(?:(?<=[\d)}\]])|(?<=\\pi))\s+(?P<unit>[A-Za-z]{2}[A-Za-z ./^{}\d]*)$")
_SMALL_TEXT = re.compile(rf"\\text\s*\{{\s*([^{{}}A-Za-z]*[A-Za-z]?[^{{}}A-Za-z]*|{'|'.join(_FUNCTIONS)})\s*\}}")
_RUN = re.compile(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|(?P<letters>[A-Za-z]+)")
_STAR_POWER = re.compile(r"\*\*\s*")
_LONG_POWER = re.compile(r"\^\s*([+-]?\d+\.\d+|[+-]?\d{2,}|-\d)", re.ASCII)
_BARE_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)", re.ASCII)
_LOG_BASE = re.compile(r"\\log\s*_\s*(\d)", re.ASCII)
_OPENED = re.compile(r"(?P<root>\\sqrt\s*)\(|(?P<power>\^\s*)\(|\(|(?P<close>\))")
_ANGLE = re.compile(r"(\d+(?:\.\d+)?|\\pi)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])", re.ASCII)
_TRIGONOMETRY = re.compile(rf"\\(?:{'|'.join(_TRIGONOMETRIC)})(?![A-Za-z])")
_PLUS_MINUS = re.compile(r"\+\s*-")
_IMAGINARY = re.compile(r"(?<=\d)i(?![A-Za-z])")

_ARITHMETIC = re.compile(
    r"(?:\\(?:frac|binom|cdot|times|div|pi|infty|ln|lg|exp|log_?|sqrt|sinh|cosh|tanh|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|gcd|lcm"
    r"|max|min|lfloor|rfloor|lceil|rceil|sum|prod)(?![A-Za-z])|\\[%{}]|[\d\s+\-*/^().!|{}\[\],:=_·]"
    r"|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))*",
    re.ASCII,
)
_VARIABLE = re.compile(r"(?<![A-Za-z])[a-df-hj-zA-Z](?![A-Za-z])")
_BINDS_VARIABLE = re.compile(r"\\(?:sum|prod)(?![A-Za-z])")
_TAKES_LIST = re.compile(r"\\(?:gcd|lcm|max|min)(?![A-Za-z])")
_RATIO = re.compile(r"\s*\d+(?:\.\d+)?\s*:\s*\d+(?:\.\d+)?\s*", re.ASCII)
_APART = re.compile(r"[\d.]\s+[\d.]", re.ASCII)
_MIXED = re.compile(r"\d\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", re.ASCII)
_SUBSCRIPT = re.compile(r"(?<!\\log)(?<!\\sum)(?<!\\prod)_")

_FORMULA = re.compile(
    r"(?:\\(?!text)[A-Za-z]+|\\[%{}]|[\d\s+\-*/^().!|{}\[\],:=_<>]|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))+", re.ASCII
)

_RELATION = re.compile(r"[<>]|\\(?:neq|leq|geq|approx|in|notin|sim|equiv|subset|subseteq)(?![A-Za-z])")
_WORDS = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}|\\text\s*\{([^{}]*)\}|\\[A-Za-z]+|(?![A-Z]+(?![a-z]))[A-Za-z]{4,}")
_BLANKS = re.compile(r"\s+")
_BLANKS_BETWEEN = re.compile(r"(?<=[\w.])\s+(?=[\w.])")
_LETTER_RUN = re.compile(r"[^\W\d_]{2,}")


def as_latex(text: str) -> str:
    r"""Return LaTeX for the parser: units left out, ASCII names as commands, ``\text`` around words only."""
    text = _UNIT.sub(lambda match: " " if is_unit(f" {match['unit']}") else match[0], text)
    bare = _BARE_UNIT.search(text)
    if bare and is_unit(f" {bare['unit']}"):
        text = text[: bare.start()]
    text = _SMALL_TEXT.sub(r" \1 ", text)
    text = _RUN.sub(_as_command, text)
    text = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _LONG_POWER.sub(r"^{\1}", _STAR_POWER.sub("^", text))
    text = _round_to_curly(_LOG_BASE.sub(r"\\log_{\1}", text))
    text = _ANGLE.sub(r"(\1\\pi/180)" if _TRIGONOMETRY.search(text) else r"\1", text)
    text = _IMAGINARY.sub(" i", _PLUS_MINUS.sub("- ", text))
    return text.replace("·", r"\cdot ").replace(r"\%", "%").replace("%", r"\%")


def _as_command(run: re.Match[str]) -> str:
    letters = run["letters"]
    if not letters or len(letters) == 1:
        return run[0]
    fused = _FUSED.fullmatch(letters)
    return f"\\{fused[1]} {fused[2]}" if fused else _NAMES.get(letters, letters)


def _round_to_curly(text: str) -> str:
    r"""Write ``\sqrt(x)`` as ``\sqrt{x}`` and ``^(x)`` as ``^{x}``."""
    if r"\sqrt" not in text and "^" not in text:
        return text
    pieces: list[str] = []
    closers: list[str] = []
    start = 0
    for match in _OPENED.finditer(text):
        pieces.append(text[start : match.start()])
        start = match.end()
        if match["close"]:
            pieces.append(closers.pop() if closers else ")")
        elif match["root"] or match["power"]:
            pieces.append(f"{(match['root'] or match['power']).rstrip()}{{")
            closers.append("}")
        else:
            pieces.append("(")
            closers.append(")")
    return "".join([*pieces, text[start:]])


def is_misread(latex: str) -> bool:
    """Tell whether the parser takes a formula for another: it adds up numbers side by side, and 4 and 10/3 to 4 10/3."""
    return _APART.search(latex) is not None or any(int(above) >= int(below) for above, below in _MIXED.findall(latex))


def is_arithmetic(latex: str) -> bool:
    """Tell whether a formula can stand for one number: operations, functions, e and i, without words and relations."""
    if not _ARITHMETIC.fullmatch(latex) or _SUBSCRIPT.search(latex):  # the parser drops subscripts of numbers
        return False
    if _VARIABLE.search(latex) and not _BINDS_VARIABLE.search(latex):
        return False
    if "," in latex and not (_TAKES_LIST.search(latex) and "," not in top_level(latex)):
        return False
    return ":" not in latex or _RATIO.fullmatch(latex) is not None


def is_formula(text: str) -> bool:
    """Tell whether a text is mathematics alone: a number, a letter, an equation, an interval, a list."""
    return _FORMULA.fullmatch(as_latex(text)) is not None


def has_relation(text: str) -> bool:
    """Tell whether a text holds a relation other than ``=``."""
    return _RELATION.search(text) is not None


def words(latex: str) -> frozenset[str]:
    r"""Return what is neither mathematics nor ``and`` or ``or``: the words of ``\text{...}``, and long runs of letters."""
    found: set[str] = set()
    for match in _WORDS.finditer(latex):
        if not match[0].startswith("\\") or match[1]:
            found.update(_LETTER_RUN.findall((match[1] or match[0]).lower()))
    return frozenset(found - {"and", "or"})


def plain(text: str) -> str:
    """Return a text without the case of its words, and without blanks except between letters, digits and points."""
    text = _LETTER_RUN.sub(
        lambda run: run[0].lower() if len(run[0]) > 2 or run[0].istitle() else run[0], without_wrappers(text)
    )
    return _BLANKS.sub("", _BLANKS_BETWEEN.sub("\0", text)).replace("\0", " ")
