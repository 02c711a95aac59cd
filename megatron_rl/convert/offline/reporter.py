"""What long work on files says of itself."""

from __future__ import annotations


class Reporter:
    """What long work says of itself. This one says nothing."""

    def begin(self, what: str, total_bytes: int) -> None:
        """Work of so many bytes starts."""

    def advance(self, num_bytes: int) -> None:
        """So many more are done; called from any thread."""

    def end(self) -> None:
        """The work that began last is over."""

    def say(self, text: str) -> None:
        """A line for the user."""
