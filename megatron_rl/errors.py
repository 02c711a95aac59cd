"""The one kind of error a user can fix: it names the field, the value received, the rule and the fix."""

from __future__ import annotations

MAX_SHOWN = 300
"""Characters of a value, or of another error's message, that are printed."""


class UserError(ValueError):
    """Something the user gave is wrong. Prints as ``field = value: rule. Fix: fix.``, always on one line.

    Args:
        field: what is wrong, as the user would find it: a dotted config key, ``file:line``, a path.
        value: the value received; ``None`` where showing one would say nothing.
        rule: what has to hold, in a few words, without a full stop.
        fix: what to do about it, without a full stop.
    """

    def __init__(self, field: str, value: object, rule: str, fix: str) -> None:
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        shown = "" if value is None else f" = {shortened(repr(value))}"
        super().__init__(f"{one_line(field)}{shown}: {one_line(rule)}. Fix: {one_line(fix)}.")

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        """Keep the four parts when the error crosses a process border."""
        return type(self), (self.field, self.value, self.rule, self.fix)


def described(error: BaseException) -> str:
    """Say what code from outside raised, as ``Type: message``: shortened, on one line."""
    message = shortened(str(error))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def shortened(text: str) -> str:
    """Put a text on one line, and leave the middle of a long one out."""
    text = one_line(text)
    half = MAX_SHOWN // 2
    return text if len(text) <= MAX_SHOWN else f"{text[:half]} ... {text[-half:]}"


def one_line(text: str) -> str:
    """Join the lines of a text; spaces within a line stay, because a value may differ in nothing else."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
