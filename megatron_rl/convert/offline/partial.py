"""A directory that comes into being whole: written under another name by several threads, resumed when killed, renamed last.

    .<name>.partial/           files of the coming directory, at their full sizes from the start
    .<name>.partial.journal    first line: what is being written, from what; then one line for each part that is on disk
    <name>/                    appears when every part is there and synced

A part is a range of one file. Its line is written after the file was synced, so whatever the journal names survived any
crash, and a new start skips it; everything else is written again.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from megatron_rl.convert.hf.writer import CALL_BYTES, check_target
from megatron_rl.convert.offline.memory import keep_freed_memory
from megatron_rl.convert.offline.reporter import Reporter
from megatron_rl.convert.tables.digest import MASK, as_text
from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, disk_error, disk_errors, publish_folder
from megatron_rl.process.lock import try_lock

_PART_BYTES = 2**27
_MAX_PARTS = 512

_CALL_BUFFERS = 512
_GOES_ON = f"{SAME_COMMAND}: it goes on where it stopped"

Content = TypeVar("Content")


def part_bytes(total_bytes: int) -> int:
    """Return the rough size of one part, which a kill can cost a thread. Small parts sync while others are written."""
    return max(_PART_BYTES, total_bytes // _MAX_PARTS)


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Open a pool whose threads use the cores, so that torch must not spread the work again."""
    keep_freed_memory()
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "convert", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # parts of the setting belong to the process, not to the thread


@dataclass(frozen=True)
class FilePart(Generic[Content]):
    """The range of a file that one thread writes before it syncs."""

    number: int
    file: str
    content: Content
    num_bytes: int


class BufferedStream:
    """Writes buffers one behind the other from a position on; many small ones go in one call of the system."""

    def __init__(self, descriptor: int, position: int) -> None:
        self._descriptor, self._position = descriptor, position
        self._buffers: list[memoryview] = []
        self._held = 0

    def write(self, data: memoryview | bytes) -> None:
        """Write data, which must not change until ``flush``."""
        view = memoryview(data).cast("B")
        while len(view):
            room = CALL_BYTES - self._held
            self._buffers.append(view[:room])
            self._held += len(self._buffers[-1])
            view = view[room:]
            if self._held == CALL_BYTES or len(self._buffers) == _CALL_BUFFERS:
                self.flush()

    def flush(self) -> None:
        """Write what is held."""
        buffers = self._buffers
        while buffers:
            written = os.pwritev(self._descriptor, buffers, self._position)
            self._position += written
            while buffers and written >= len(buffers[0]):
                written -= len(buffers.pop(0))
            if written:
                buffers[0] = buffers[0][written:]
        self._buffers, self._held = [], 0


class PartialDirectory:
    """The directory while it is being written.

    Args:
        target: its final name; must not exist, or be empty.
        identity: plain data that tells this work from any other on the same target: what is read, what is written.
        file_bytes: final size of every file that ``write`` fills.
        reporter: told what is resumed.

    Raises:
        UserError: ``target`` is taken, the disk lacks room, nothing can be written there, or another process is at it.
    """

    def __init__(
        self, target: str | Path, identity: Mapping[str, Any], file_bytes: Mapping[str, int], reporter: Reporter
    ) -> None:
        self.target = Path(target).absolute()
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self.digests: dict[str, int] = {}
        """Sums over the written parts, by tensor."""
        self.done: set[int] = set()
        self._journal_path = self.path.with_name(self.path.name + ".journal")
        self._reporter, self._lock = reporter, threading.Lock()
        there = sum(path.stat().st_blocks * 512 for path in self.path.glob("*")) if self.path.is_dir() else 0
        check_target(self.target, max(0, sum(file_bytes.values()) - there))
        with disk_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._journal = self._journal_path.open("a+", encoding="utf-8")
            self._take_lock()
            self._resume(json.loads(json.dumps(identity)), file_bytes)

    def write(
        self,
        parts: Sequence[FilePart[Content]],
        fill: Callable[[FilePart[Content], int, Callable[[int], None]], dict[str, int]],
        *,
        num_threads: int,
    ) -> None:
        """Write all parts that are not done.

        Args:
            parts: of all files.
            fill: writes one, given an open descriptor of its file and what to call for bytes done; returns the digests of
                the tensors that it wrote, or of its pieces of them.
            num_threads: parts written at a time.

        Raises:
            UserError: the disk is full or fails. What is on disk stays for the next start.
        """
        stop = threading.Event()

        def advance(num_bytes: int) -> None:
            if stop.is_set():
                raise _Stopped
            self._reporter.advance(num_bytes)

        def work(part: FilePart[Content]) -> None:
            if stop.is_set():
                return
            descriptor = os.open(self.path / part.file, os.O_WRONLY)
            try:
                digests = fill(part, descriptor, advance)
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
            self._record(part, digests)

        self._reporter.advance(sum(part.num_bytes for part in parts if part.number in self.done))
        with threads(num_threads) as pool:
            futures = [pool.submit(work, part) for part in parts if part.number not in self.done]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException as error:
                stop.set()
                for future in futures:
                    future.cancel()
                if isinstance(error, OSError):
                    raise self.failed(error) from error
                raise

    def finish(self) -> None:
        """Sync everything and give the directory its name.

        Raises:
            UserError: that fails.
        """
        with disk_errors(self.target, fix=_GOES_ON):
            publish_folder(self.path, self.target)
        self._journal_path.unlink()
        self.close()

    def close(self) -> None:
        """Leave what is written for the next start."""
        self._journal.close()

    def failed(self, error: OSError) -> UserError:
        """Return an error of the system while writing as a UserError."""
        return disk_error(self.target, error, fix=_GOES_ON)

    def _take_lock(self) -> None:
        if not try_lock(self._journal.fileno()):
            rule, fix = "is being written by another process", "wait for it, or choose another directory"
            raise UserError(str(self.target), None, rule, fix)

    def _resume(self, identity: Any, file_bytes: Mapping[str, int]) -> None:
        self._journal.seek(0)
        lines = _whole_lines(self._journal.read())
        is_same = bool(lines) and lines[0] == {"identity": identity}
        sizes = {path.name: path.stat().st_size for path in self.path.glob("*")} if self.path.is_dir() else {}
        if is_same and all(sizes.get(file) == size for file, size in file_bytes.items()):
            for line in lines[1:]:
                self._add(line["part"], {name: int(text, 16) for name, text in line["digests"].items()})
            # A line that a crash cut short has no end: the next one must not be glued to it.
            self._rewrite(lines)
            if self.done:
                self._reporter.say(f"going on with an earlier start: {len(self.done)} parts are on disk already")
            return
        if lines:
            self._reporter.say("an earlier start had other input or options, or lost files: starting over")
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        for file, size in file_bytes.items():
            with (self.path / file).open("wb") as handle:
                handle.truncate(size)
        self._rewrite([{"identity": identity}])

    def _rewrite(self, lines: Sequence[Any]) -> None:
        self._journal.seek(0)
        self._journal.truncate()
        self._journal.write("".join(json.dumps(line) + "\n" for line in lines))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _record(self, part: FilePart[Content], digests: dict[str, int]) -> None:
        line = json.dumps({"part": part.number, "digests": {name: as_text(value) for name, value in digests.items()}})
        with self._lock:
            self._journal.write(line + "\n")
            self._journal.flush()
            os.fdatasync(self._journal.fileno())
            self._add(part.number, digests)

    def _add(self, number: int, digests: Mapping[str, int]) -> None:
        if number not in self.done:
            self.done.add(number)
            for name, value in digests.items():
                self.digests[name] = (self.digests.get(name, 0) + value) & MASK


class _Stopped(Exception):
    """Another thread failed; its error is the one to show."""


def _whole_lines(text: str) -> list[Any]:
    """Return all lines up to the first that is not whole."""
    lines = []
    for line in text.splitlines(keepends=True):
        try:
            lines.append(json.loads(line) if line.endswith("\n") else None)
        except ValueError:
            lines.append(None)
        if lines[-1] is None:
            return lines[:-1]
    return lines
