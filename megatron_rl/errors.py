"""The one kind of error a user can fix: it names the field, the value received, the rule and the fix."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

MAX_SHOWN = 300
"""Characters of a value, or of another error's message, that are printed."""
MIN_HIDDEN = 8
"""Length from which on a secret is looked for inside other texts: shorter ones are parts of words."""
MASK = "***"
SECRET_NAME = re.compile(
    r"(.*_)?(api_?key|access_?key|private_?key|secret_?key|password|passwd|passphrase|pwd|secret|credentials?|auth|authorization)"
    r"|((.*_)?(access|api|auth|bearer|hf|login|refresh|security|session)_)?token",
    re.IGNORECASE,
)
"""Names of secrets, with underscores for hyphens."""
SECRET_PARAMETER = re.compile(rf"{SECRET_NAME.pattern}|(.*_)?(key|sig|signature)", re.IGNORECASE)
"""Names of secrets behind the ``?`` of a URL."""
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


def is_clear_text(name: str, value: object) -> bool:
    """Tell a secret that is written out: by its name, or because it is a URL that holds one. An interpolation is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    text = str(value)
    return "${" not in text and text != "" and (_is_name(SECRET_NAME, name) or any(map(_holds_secret, text.split())))


def _is_name(names: re.Pattern[str], name: str) -> bool:
    return names.fullmatch(name.replace("-", "_")) is not None


def _holds_secret(url: str) -> bool:
    try:
        parts = urlsplit(url)
        has_password = parts.password is not None
    except ValueError:
        return False
    given = parse_qsl(parts.query) if parts.netloc else []
    return has_password or any(_is_name(SECRET_PARAMETER, name) for name, _ in given)


def _masked(name: str, value: object) -> object:
    """Return a value of a config without secrets: interpolations in place of those known, a mask for those written out."""
    if isinstance(value, dict):
        return {key: _masked(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked(name, inner) for inner in value]
    if isinstance(value, str):
        value = _HIDDEN.get(value, value)
    return MASK if is_clear_text(name, value) else value


def _last_name(field: str) -> str:
    return next((part for part in reversed(field.split(".")) if not part.isdecimal()), "")


class UserError(ValueError):
    """Something the user gave is wrong. Prints as ``field = value: rule. Fix: fix.``, always on one line.

    Args:
        field: what is wrong, as the user would find it: a dotted config key, ``file:line``, a path.
        value: the value received; ``None`` where showing one would say nothing. Secrets in it are masked.
        rule: what has to hold, in a few words, without a full stop.
        fix: what to do about it, without a full stop; a question has its mark.
    """

    def __init__(self, field: str, value: object, rule: str, fix: str) -> None:
        value = _masked(_last_name(field), value)
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        shown = "" if value is None else f" = {shortened(without_secrets(repr(value)))}"
        fix = one_line(fix)
        end = "" if fix.endswith("?") else "."
        super().__init__(without_secrets(f"{one_line(field)}{shown}: {one_line(rule)}. Fix: {fix}{end}"))

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
