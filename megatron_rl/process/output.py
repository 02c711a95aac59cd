"""Output that outlives its reader. The console is a view of a run, ``metrics.jsonl`` is the record: no run ends over a line.

print(...) --> descriptor 1 --> terminal, pipe or file
                    |  that cannot be written any more (head, a dead ssh, a full disk)
                    +--> the file of LOG_VARIABLE, such as <run>/logs/console.log
                              |  nor can that, or there is none
                              +--> nowhere
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import TextIO

LOG_VARIABLE = "MEGATRON_RL_CONSOLE_LOG"
"""File that output goes on in after its reader has gone; the launcher and the ranks of a node inherit it."""


def keep_output() -> None:
    """Let this process's standard streams outlive their readers, and take the place of those that are closed.

    Call it first: the next file or socket to be opened would get the number of a closed stream, and all output with it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = open_output(1, like=sys.stdout), open_output(2, like=sys.stderr)


def open_output(descriptor: int, like: TextIO | None = None) -> TextIO:
    """Return a text stream on a descriptor, which stays open; what it cannot write goes on elsewhere.

    Args:
        descriptor: open for writing.
        like: stream to take the encoding from.
    """
    encoding = "utf-8" if like is None else like.encoding
    raw = io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)


def open_log(path: str | os.PathLike[str]) -> int:
    """Open a log for appending, which nobody else reads: SGLang's has rollouts, and perhaps keys.

    A link in its place would lead output into any file of the user's: it is replaced.

    Raises:
        OSError: it cannot be written.
    """
    if os.path.islink(path):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with contextlib.suppress(OSError):  # of an earlier version, or of another user who let this one write
        os.fchmod(descriptor, 0o600)
    return descriptor


class _Descriptor(io.FileIO):
    """A descriptor that is pointed elsewhere once it cannot be written."""

    _is_moved = False

    def write(self, data: object) -> int:
        """Write all or a part."""
        while True:
            try:
                written = super().write(data)  # type: ignore[arg-type]
            except OSError as error:
                self._move(error)
                continue
            if written is not None:
                return int(written)
            select.select([], [self], [])  # it does not block, because another who has it wants it so

    def _move(self, error: OSError) -> None:
        path = "" if self._is_moved else os.environ.get(LOG_VARIABLE, "")
        self._is_moved = True
        try:
            new = open_log(path)
        except OSError:
            new, path = os.open(os.devnull, os.O_WRONLY), ""
        os.dup2(new, self.fileno())
        os.close(new)
        if path:
            with contextlib.suppress(OSError):
                name = {1: "standard output", 2: "standard error"}.get(self.fileno(), "the console")
                line = f"process {os.getpid()}: {name} cannot be written ({error.strerror}); it goes on here\n"
                os.write(self.fileno(), line.encode())
