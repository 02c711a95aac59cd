"""``metrics.jsonl``: one JSON object a step, valid whatever the numbers, whole whatever kills the run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path

from megatron_rl.config.section import RESERVED
from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, atomic_file, disk_errors, sync, write_atomic

logger = logging.getLogger(__name__)

Row = dict[str, float]

REWARD, PASS_1, ENTROPY, LENGTH = "reward/mean", "pass@1", "entropy/mean", "response_length/mean"
LOSS, GRAD_NORM, LR = "loss", "grad_norm", "lr"
"""Names of the metrics that the console and the curves show."""
EVAL_PREFIX = "eval/"
OF_ALL_SETS = ("seconds", "pool_forward_kl", "pool_log_ratio")
"""Metrics below ``eval/`` that are no set's own."""
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def set_prefixes(keys: Iterable[str]) -> dict[str, str]:
    """Return the held-out sets that metrics are of: name -> prefix of its metrics; ``""`` is a set without a name."""
    prefixes = {}
    for key in keys:
        if key.startswith(EVAL_PREFIX):
            first, inner, _ = key.removeprefix(EVAL_PREFIX).partition("/")
            name = first if inner and first not in RESERVED else ""
            if name or first not in OF_ALL_SETS:
                prefixes[name] = f"{EVAL_PREFIX}{name}/" if name else EVAL_PREFIX
    return prefixes


def json_safe(value: object) -> object:
    """Replace each NaN or infinity, at any depth, by its string."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return value


def read_metrics(path: Path) -> list[Row]:
    """Read the rows of a ``metrics.jsonl`` in file order, with numbers restored. Lines that do not parse are left out."""
    return _parse(path.read_bytes())[0]


def _parse(raw: bytes) -> tuple[list[Row], list[int]]:
    """Return the rows, and the numbers (from 1) of the lines that are no rows."""
    rows: list[Row] = []
    bad: list[int] = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({key: NOT_FINITE[x] if isinstance(x, str) and x in NOT_FINITE else x for key, x in row.items()})
        else:
            bad.append(number)
    return rows, bad


def _encode(row: Row) -> bytes:
    return json.dumps(json_safe(row), allow_nan=False).encode() + b"\n"


def as_number(key: str, value: float) -> float:
    """Return the plain number that a numpy scalar or a tensor of one element holds."""
    if isinstance(value, str):
        raise TypeError(f"metric {key!r} is the text {value!r}, not a number")
    return int(value) if isinstance(value, int) else float(value)


def _as_user_error(path: Path) -> AbstractContextManager[None]:
    return disk_errors(path, field="exp_manager.exp_dir", fix=f"{SAME_COMMAND}: the run resumes")


class MetricsFile:
    """``metrics.jsonl``: appended line by line, repaired on open, rewritten only by an atomic rename.

    A process killed while it writes leaves an incomplete last line; opening drops that line. No crash of this program can
    break any other line, so that is an error rather than a silent loss.

    Only one rank writes and may raise; the caller makes all ranks raise the same error.

    Raises:
        UserError: a line before the last one is not a row; or, from every method, the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _as_user_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = path.read_bytes() if path.exists() else b""
        rows, bad = _parse(raw)
        last_line = len(raw.rstrip(b"\n").split(b"\n"))
        for number in bad:
            if number != last_line:
                raise UserError(f"{path}:{number}", None, "is not a metrics row", "delete the line or move the file")
        if bad:
            logger.warning("%s: dropped a half-written last line", path)
        with _as_user_error(path):
            if bad or (raw and not raw.endswith(b"\n")):
                write_atomic(path, b"".join(map(_encode, rows)))
            self._file = self._open()
        self._steps = {int(row["step"]) for row in rows}

    def _open(self) -> FileIO:
        # Unbuffered: with a buffer, close would try again what did not fit on the disk, and its error would hide the first.
        return self.path.open("ab", buffering=0)

    @property
    def last_step(self) -> int | None:
        """The highest step that has a row; None in an empty file."""
        return max(self._steps, default=None)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self._steps)

    def append(self, row: Row) -> None:
        """Add the row of a new highest step; the operating system has it when this returns."""
        data = _encode(row)
        with _as_user_error(self.path):
            while data:  # a disk that is nearly full takes a part, and refuses the rest
                data = data[self._file.write(data) :]
        self._steps.add(int(row["step"]))

    def add(self, step: int, values: Row) -> None:
        """Add values to the row of a step, which may be new. Other rows are copied one by one: a long run has many."""
        row: Row | None = {"step": step, **values}
        with _as_user_error(self.path):
            self._file.close()
            with atomic_file(self.path) as temporary, self.path.open("rb") as old, temporary.open("wb") as new:
                for line in old:
                    if not line.strip():
                        continue
                    [found], _ = _parse(line)
                    if row is not None and found["step"] >= step:
                        is_same = found["step"] == step
                        new.write(_encode(found | values if is_same else row))
                        line, row = b"" if is_same else line, None
                    new.write(line)
                if row is not None:
                    new.write(_encode(row))
            self._file = self._open()
        self._steps.add(step)

    def rewrite(self, rows: list[Row]) -> None:
        """Replace the content, in the order of steps."""
        with _as_user_error(self.path):
            self._file.close()
            write_atomic(self.path, b"".join(_encode(row) for row in sorted(rows, key=lambda row: row["step"])))
            self._file = self._open()
        self._steps = {int(row["step"]) for row in rows}

    def sync(self) -> None:
        """Bring all rows to disk, as a power cut would find them."""
        with _as_user_error(self.path):
            os.fsync(self._file.fileno())
            sync(self.path.parent)

    def close(self) -> None:
        """Close the file; the operating system has the rows already."""
        self._file.close()
