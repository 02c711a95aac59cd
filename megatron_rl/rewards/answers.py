r"""Where a response states its final answer. The first kind of mark that a response has counts, and of it the last one:

1. the last ``\boxed{...}`` or ``\fbox{...}`` with something in it, a box around boxes included,
2. ``<answer>...</answer>`` with something in it,
3. a line ``#### 72``: a number alone, with a unit at most. ``#### Step 1`` is a heading of Markdown,
4. a sentence ``The answer is 72.``, ``**Answer:** $x + 1$``, ``答案是72``: a number, a short formula or a choice letter, and
   nothing else up to the end of the sentence or line. The last such sentence has to hold one.

A box or ``<answer>`` that is opened after the last closed one and never closed was cut within the answer: there is none.
"""
# ruff: noqa: RUF001 - full-width colons

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

from megatron_rl.rewards.formula import is_formula
from megatron_rl.rewards.notation import normalise
from megatron_rl.rewards.quantity import read_quantity

MAX_SHORT_CHARS = 200
"""Longest answer of a sentence or of a ``####`` line."""
MAX_LEAD_CHARS = 40
MAX_SENTENCE_CHARS = 600
"""Text before and after the word "answer" that is looked at."""
MAX_MARKS = 50
"""Marks of one kind that are looked at, from the end: a broken model may write 50,000."""

_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\[\\{}]|(?P<open>\{)|(?P<close>\})")
_TAG = re.compile(r"<(?P<slash>/?)answer>", re.IGNORECASE)
_HASHES = re.compile(r"(?<!#)####(?!#)(?P<rest>[^\n#]*)(?=\n|\Z)")
_HEADING_WORD = re.compile(r"[A-Z][a-z]")
_ANSWER = re.compile(r"nswer|NSWER|答案")
_ONSET = re.compile(r"(?<![A-Za-z])a\Z", re.IGNORECASE)
_THE = re.compile(
    r"(?<!if )(?<!suppose )(?<!assume )(?<!whether )\bthe\s+(?:(?:final|correct|right)\s+)?a\Z", re.IGNORECASE
)
_IS = re.compile(r"nswer(?:\s+to\s+(?:the|this)\s+(?:question|problem))?\s+is\b(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_COLON = re.compile(r"(?:nswer\s*(?:\*\*)?\s*[:：]|答案\s*(?:是|为|為|[:：]))(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_REST = re.compile(
    r"\s*(?:\*\*)?\s*(?:[:：]\s*)?((?:\$\$[^$]{1,200}\$\$|\\\[.{1,200}?\\\])(?=[ .。*]*(?:\n|\Z))|[^\n]*)", re.DOTALL
)
_SENTENCE_END = re.compile(r"(?<!\.)\.(?=[\s*_]*\Z|[*_]*\s+[A-Z\"'(\[*#$\\])|。")
_MATHEMATICS = re.compile(r"\$\$[^$]+\$\$|\$[^$]+\$|\\\((?:(?!\\[()]).)+\\\)|\\\[(?:(?!\\[\[\]]).)+\\\]", re.DOTALL)
_SAYS_SOMETHING = re.compile(r"[\d$\\]")


def find_marked_answer(response: str) -> str | None:
    """Find the final answer that a response marks.

    Returns:
        The answer as it stands there; "" where it was cut within its mark; None where nothing is marked.
    """
    for find in (_last_boxed, _last_tagged, _last_hashed, _last_stated):
        found = find(response)
        if found is not None:
            return found
    return None


def _last_boxed(response: str) -> str | None:
    """Find the last box in one pass with a stack; a search from each box is quadratic in a response of unclosed boxes."""
    open_braces: list[int | None] = []  # where the content of a box starts; None for a brace that is no box
    last_start, last = -1, None
    for match in _BRACES.finditer(response):
        if match["box"]:
            open_braces.append(match.end())
        elif match["open"]:
            open_braces.append(None)
        elif match["close"] and open_braces:
            start = open_braces.pop()
            if start is not None and match.start() > start and not response[start : match.start()].isspace():
                last_start, last = start, response[start : match.start()].strip()
    is_cut = any(start is not None and start > last_start for start in open_braces)
    return "" if is_cut else last


def _last_tagged(response: str) -> str | None:
    start, best = -1, None
    for match in _TAG.finditer(response):
        if not match["slash"]:
            start = match.end()
        elif start >= 0:
            best = response[start : match.start()].strip() or best
            start = -1
    return "" if start >= 0 else best


def _last_hashed(response: str) -> str | None:
    """Find the last ``####`` line with a number alone; ``#### 2 Methods`` above more text is a heading, too."""
    for match in _from_the_end(_HASHES, response):
        rest = match["rest"].strip()
        is_heading = _HEADING_WORD.search(rest) and response[match.end() :].strip()
        if rest and not is_heading and "=" not in rest and _is_quantity(rest):
            return rest
    return None


def _last_stated(response: str) -> str | None:
    """Find the last sentence that states an answer; one whose answer is more than that leaves the response without."""
    for match in _from_the_end(_ANSWER, response):
        rest = _stated(
            response[max(0, match.start() - MAX_LEAD_CHARS) : match.start()],
            response[match.start() : match.end() + MAX_SENTENCE_CHARS],
        )
        end = _SENTENCE_END.search(rest)
        answer = (rest[: end.start()] if end else rest).strip("*_` \t")
        if _is_short_answer(answer):
            return answer
        if _SAYS_SOMETHING.search(answer):
            return None
    return None


def _stated(before: str, after: str) -> str:
    """Return what is said to be the answer, up to the end of its line; ``after`` begins within the word."""
    said = _COLON.match(after) if after.startswith("答") or _ONSET.search(before) else None
    said = said or (_IS.match(after) if _THE.search(before) else None)
    rest = _REST.match(said["rest"]) if said else None
    return rest[1] if rest else ""


def _from_the_end(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    return reversed(deque(pattern.finditer(text), maxlen=MAX_MARKS))


def _is_short_answer(text: str) -> bool:
    if not text or len(text) > MAX_SHORT_CHARS:
        return False
    return _MATHEMATICS.fullmatch(text) is not None or _is_quantity(text) or is_formula(normalise(text))


def _is_quantity(text: str) -> bool:
    return len(text) <= MAX_SHORT_CHARS and read_quantity(normalise(text)) is not None
