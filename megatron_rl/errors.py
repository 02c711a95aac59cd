"""The one kind of error a user can fix: it names the field, the value received, the rule and the fix."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong. Prints as ``field = value: rule. Fix: fix``.

    Args:
        field: what is wrong, as the user would find it: a dotted config key, ``file:line``, a path.
        value: the value received; ``None`` where showing one would say nothing.
        rule: what has to hold, in a few words, without a full stop.
        fix: what to do about it, without a full stop.
    """

    def __init__(self, field: str, value: object, rule: str, fix: str) -> None:
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        shown = "" if value is None else f" = {value!r}"
        super().__init__(f"{field}{shown}: {rule}. Fix: {fix}.")

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        """Keep the four parts when the error crosses a process border."""
        return type(self), (self.field, self.value, self.rule, self.fix)
