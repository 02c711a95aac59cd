"""The text of each token, such that the texts joined are the text of all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

WINDOW = 6
"""Tokens before a token that decide how it reads."""

MAX_KNOWN = 100_000
"""Pairs of tokens that are remembered: some 20 MB."""


class TokenTexts:
    """Texts of single tokens; how a token reads after another is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[int | None, int], str] = {}
        """By token and the one before it."""

    def of(self, ids: Sequence[int]) -> list[str]:
        """Return one text for each token.

        Where a character takes several tokens its text is with the last of them, and the others have none. Where a tokenizer
        reads a token differently at the start of a text, it is read after those before it.
        """
        texts = [self._after(before, token) for before, token in pairwise([None, *ids]) if token is not None]
        if "".join(texts) == self._tokenizer.decode(list(ids)):
            return texts
        return self._in_context(ids)

    def _after(self, before: int | None, token: int) -> str:
        known = self._known.get((before, token))
        if known is None:
            if before is None:
                known = self._tokenizer.decode([token])
            else:
                known = self._tokenizer.decode([before, token])[len(self._tokenizer.decode([before])) :]
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[before, token] = known
        return known

    def _in_context(self, ids: Sequence[int]) -> list[str]:
        texts: list[str] = []
        start = shown = 0  # the window begins at start; tokens before shown have given their text
        for place in range(len(ids)):
            if shown - start > WINDOW:
                start = shown - WINDOW
            before = self._tokenizer.decode(list(ids[start:shown]))
            now = self._tokenizer.decode(list(ids[start : place + 1]))
            is_open = (
                now.endswith("\ufffd") and place + 1 < len(ids) and place + 1 - shown < 4
            )  # a character has 4 bytes
            texts.append("" if is_open else now[len(before) :])
            shown = shown if is_open else place + 1
        return texts
