"""The one kind of error a user can fix: it names the field, the value received, the rule and the fix."""

from __future__ import annotations

MAX_SHOWN = 300
"""Characters of a value, or of another error's message, that are printed."""
MIN_HIDDEN = 8
"""Length from which on a secret is looked for inside other texts: shorter ones are parts of words."""
_HIDDEN: dict[str, str] = {}


def hide(secret: str, text: str) -> None:
    """Let every ``UserError`` of this process say ``text`` in place of a secret."""
    _HIDDEN[secret] = text


def without_secrets(text: str) -> str:
    """Replace the secrets in a text."""
    for secret in sorted(_HIDDEN, key=len, reverse=True):
        if len(secret) >= MIN_HIDDEN:
            text = text.replace(secret, _HIDDEN[secret]).replace(repr(secret)[1:-1], _HIDDEN[secret])
    return text


class UserError(ValueError):
    """Something the user gave is wrong. Prints as ``field = value: rule. Fix: fix.``, always on one line.

    Args:
        field: what is wrong, as the user would find it: a dotted config key, ``file:line``, a path.
        value: the value received; ``None`` where showing one would say nothing.
        rule: what has to hold, in a few words, without a full stop.
        fix: what to do about it, without a full stop.
    """

    def __init__(self, field: str, value: object, rule: str, fix: str) -> None:
        value = _HIDDEN.get(value, value) if isinstance(value, str) else value
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        shown = "" if value is None else f" = {shortened(without_secrets(repr(value)))}"
        super().__init__(without_secrets(f"{one_line(field)}{shown}: {one_line(rule)}. Fix: {one_line(fix)}."))

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
