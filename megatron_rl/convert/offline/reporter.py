"""Progress of long work on files."""

from __future__ import annotations


class Reporter:
    """Receives the progress of long work. This one says nothing."""

    def begin(self, what: str, total_bytes: int) -> None:
        """Start work of this many bytes."""

    def advance(self, num_bytes: int) -> None:
        """Count further bytes as done; called from any thread."""

    def end(self) -> None:
        """End the work that began last."""

    def say(self, text: str) -> None:
        """Say one line to the user."""
