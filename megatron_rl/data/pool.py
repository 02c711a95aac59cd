"""Trajectories on disk, for methods that train on stored samples: rehearsal (DPH-RL), replay (RLEP).

    pool/
        shard_000000/            whole or not there; never changed
            rows.bin             a record of 40 bytes for each trajectory: where it lies, lengths, reward, checksum
            data.bin             the trajectories, one after the other
            manifest.json        counts, sizes, provenance; written last
        shard_000001/

A trajectory in data.bin, filled up with zeros to a multiple of four bytes:

    prompt_ids       int32
    response_ids     int32
    ref_log_probs    float32, where they are known
    response_mask    uint8, where some tokens were not generated (a tool's output): 1 where one was
    problem_id       UTF-8

Everything is mapped, nothing is held: opening costs the manifests, a row costs its pages. Appending adds a shard. Each record
has the CRC-32 of itself and its trajectory, checked whenever it is read, so that a flipped bit never trains. Numbers are
little-endian.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from megatron_rl.errors import UserError

FORMAT = 2
SHARD_ROWS = 100_000
"""A writer begins another shard after so many."""

_RECORD = np.dtype(
    [
        ("start", "<i8"), ("problem", "<u8"), ("prompt_length", "<i4"), ("response_length", "<i4"),
        ("text_length", "<i4"), ("flags", "<u4"), ("reward", "<f4"), ("checksum", "<u4"),
    ]
)  # fmt: skip
"""``start`` in bytes of data.bin, ``problem`` a hash of the id, lengths in tokens and in bytes of the id."""
_HEAD = struct.Struct("<qQiiiIf")
"""A record without its checksum."""
_WHOLE = struct.Struct("<qQiiiIfI")
_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")
_HAS_REF, _HAS_MASK = 1, 2
_BUFFER_BYTES = 2**22
_CHUNK_ROWS = 256
"""Read at a time where all rows are read: enough to share the cost of a call, few enough for long responses."""


@dataclass(frozen=True)
class Provenance:
    """Where a shard's trajectories come from. Shards of one pool share model and tokenizer."""

    task: str
    model_digest: str
    """Of the weights that sampled them (and gave ``ref_log_probs``, where there are some)."""
    tokenizer_digest: str
    sampling: Mapping[str, float] = field(default_factory=dict)
    """``temperature``, ``top_p``, ``top_k``, ``max_new_tokens``."""

    @property
    def digests(self) -> tuple[str, str]:
        """Of model and tokenizer: what shards of one pool must have in common."""
        return self.model_digest, self.tokenizer_digest


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One stored response."""

    problem_id: str
    prompt_ids: Tensor
    """[*] int64."""
    response_ids: Tensor
    """[R] int64, R at least 1."""
    reward: float
    response_mask: Tensor | None = None
    """[R] bool; None: all generated."""
    ref_log_probs: Tensor | None = None
    """[R] float32, of the reference, at the sampling temperature; None: unknown."""


class PoolWriter:
    """Appends trajectories to a pool, shard by shard; what is in a finished shard survives any crash.

        with PoolWriter(directory, provenance) as writer:
            writer.add(trajectory)

    Raises:
        UserError: the pool there is of another model or tokenizer, or cannot be written.
    """

    def __init__(self, directory: str | Path, provenance: Provenance, *, shard_rows: int = SHARD_ROWS) -> None:
        """Args: the pool, made if there is none; of what is added; rows of a shard."""
        self.directory, self._provenance, self._shard_rows = Path(directory), provenance, shard_rows
        for shard in _shards(self.directory):
            _check_origin(shard, _manifest(shard), *provenance.digests)
        self._shard: _ShardWriter | None = None

    def add(self, trajectory: Trajectory) -> None:
        """Append one."""
        if self._shard is None:
            self._shard = _ShardWriter(self.directory, self._provenance)
        self._shard.add(trajectory)
        if self._shard.num_rows == self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Finish the shard at hand: from now on it is part of the pool."""
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.finish()

    def __enter__(self) -> PoolWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Without an error, finish; with one, keep only the shards that were finished before."""
        if error is None:
            self.flush()
        elif self._shard is not None:
            self._shard.abort()


class Pool(Sequence[Trajectory]):
    """All trajectories of a pool, by number, in the order in which they were added.

    Args:
        directory: of the pool.
        model_digest: of the model that must have sampled it; None takes any.
        tokenizer_digest: of the tokenizer that its ids must be of; None takes any.

    Raises:
        UserError: no pool, a shard that is damaged or cut off, or of another model or tokenizer. From reading a trajectory: it
            is damaged.
    """

    def __init__(
        self, directory: str | Path, *, model_digest: str | None = None, tokenizer_digest: str | None = None
    ) -> None:
        self.directory = Path(directory)
        paths = _shards(self.directory)
        if not paths:
            raise UserError(str(directory), None, "holds no finished shard", "point at a pool, or build one first")
        self._shards: list[_Shard] = []
        for path in paths:
            self._shards.append(_Shard(path, first_row=self._shards[-1].end if self._shards else 0))
        self.provenance = self._shards[0].provenance
        """Of the first shard; what shards may differ in is in ``provenances``."""
        for shard in self._shards:
            _check_origin(shard.path, shard.manifest, model_digest, tokenizer_digest)
            _check_origin(shard.path, shard.manifest, *self.provenance.digests)
        self._ends = np.array([shard.end for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        """One trajectory, or a list of them for a slice; see ``take``."""
        return self.take(range(*index.indices(len(self)))) if isinstance(index, slice) else self.take([index])[0]

    def __iter__(self) -> Iterator[Trajectory]:
        for rows in _chunks(range(len(self))):
            yield from self.take(rows)

    def take(self, indices: Sequence[int] | np.ndarray) -> list[Trajectory]:
        """Trajectories by number, in this order, each checked against its checksum.

        Raises:
            IndexError: there is no such number.
            UserError: the first of them, by number, that is damaged.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"the pool has rows 0 to {len(self) - 1}")
        order = np.argsort(numbers, kind="stable")  # the disk is read in one direction
        found: list[Trajectory | None] = [None] * len(numbers)
        for shard, places in self._by_shard(numbers, order):
            for place, number in zip(places.tolist(), numbers[places].tolist()):
                found[place] = shard.read(number)
        return cast("list[Trajectory]", found)

    def rewards(self) -> np.ndarray:
        """[N] float32, without reading the trajectories."""
        return self._column("reward")

    def prompt_lengths(self) -> np.ndarray:
        """[N] int32 tokens, likewise."""
        return self._column("prompt_length")

    def response_lengths(self) -> np.ndarray:
        """[N] int32 tokens, likewise."""
        return self._column("response_length")

    def has_ref_log_probs(self) -> np.ndarray:
        """[N] bool, likewise."""
        return (self._column("flags") & _HAS_REF).astype(bool)

    def rows_of_problems(self) -> dict[str, list[int]]:
        """Row numbers of each problem, ascending; problems in the order in which they first occur.

        Reads one trajectory of each problem, for its id.
        """
        keys = self._column("problem")
        order = np.argsort(keys, kind="stable")
        firsts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        groups = sorted(np.split(order, firsts[1:]), key=lambda rows: int(rows[0]))
        numbers = np.array([rows[0] for rows in groups])
        parts = self._by_shard(numbers, np.arange(len(numbers)))
        ids = [shard.problem_id(number) for shard, places in parts for number in numbers[places].tolist()]
        return {problem_id: rows.tolist() for problem_id, rows in zip(ids, groups, strict=True)}

    def provenances(self) -> list[Provenance]:
        """The different ones of its shards, in order."""
        found: list[Provenance] = []
        for shard in self._shards:
            if shard.provenance not in found:
                found.append(shard.provenance)
        return found

    @property
    def num_shards(self) -> int:
        """How many it consists of."""
        return len(self._shards)

    @property
    def num_bytes(self) -> int:
        """On disk, manifests left out."""
        return sum(sum(shard.manifest["bytes"].values()) for shard in self._shards)

    def verify(self) -> Iterator[int]:
        """Read everything; yields the number of each trajectory that is whole, some hundred at a time.

        Raises:
            UserError: the first that is not.
        """
        for rows in _chunks(range(len(self))):
            self.take(rows)
            yield from rows

    def _by_shard(self, numbers: np.ndarray, order: np.ndarray) -> Iterator[tuple[_Shard, np.ndarray]]:
        """Each shard that holds some of the rows, and their places in ``numbers``, in the order of ``order``."""
        which = np.searchsorted(self._ends, numbers[order], side="right")
        for i in np.unique(which):
            yield self._shards[i], order[which == i]

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([shard.records[name] for shard in self._shards])


# ---------------------------------------------------------------------------------------------------------- whole pools


def num_shards(directory: str | Path) -> int:
    """The number that the next shard will have: shards ever finished, also those that somebody has removed since."""
    return max((_number(path) for path in _shards(Path(directory))), default=-1) + 1


def drop_shards_after(directory: str | Path, count: int) -> None:
    """Remove the shards numbered ``count`` and above, and what a killed writer has left.

    For work that notes ``num_shards`` after each finished piece: what was written after the last note is repeated.
    """
    folder = Path(directory)
    late = [path for path in _shards(folder) if _number(path) >= count]
    for path in [*folder.glob(".shard_*.partial"), *reversed(late)]:  # from the end: a crash leaves no gap
        _remove(path)


@contextmanager
def new_pool(directory: str | Path) -> Iterator[None]:
    """Around the building of a pool where none is: after an error nothing of it is left.

    Raises:
        UserError: a pool is there.
    """
    target = Path(directory)
    if _shards(target):
        raise UserError(str(target), None, "holds a pool already", "choose another directory, or remove this one")
    was_there = target.exists()
    try:
        yield
    except BaseException:
        drop_shards_after(target, 0)
        if not was_there:
            with suppress(OSError):
                target.rmdir()
        raise


def merge(
    sources: Iterable[str | Path], target: str | Path, *, advance: Callable[[int], None] = lambda count: None
) -> int:
    """A new pool of all trajectories of some pools, in order; returns how many. All must be of one model and tokenizer.

    Args:
        sources: pools.
        target: a directory without a pool.
        advance: told how many further trajectories are done, for progress.

    Raises:
        UserError: they are not of one model and tokenizer, one is damaged, or the target holds a pool.
    """
    pools: list[Pool] = []
    for source in sources:
        pools.append(Pool(source))
        for shard in pools[-1]._shards:
            _check_origin(shard.path, shard.manifest, *pools[0].provenance.digests)
    return _copy([(pool, np.arange(len(pool))) for pool in pools], Path(target), None, advance)


@dataclass(frozen=True)
class FilterCount:
    """What a filter did."""

    kept: int
    dropped: dict[str, int]
    """Trajectories by the first condition that they failed: ``problem``, ``reward``, ``response_tokens``, ``keep``; only
    conditions that were asked for."""


def filter_pool(
    source: str | Path,
    target: str | Path,
    *,
    min_reward: float | None = None,
    max_response_tokens: int | None = None,
    keep: Callable[[Trajectory], bool] | None = None,
    problems: Collection[str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> FilterCount:
    """A new pool of those trajectories that meet every condition given, in their order.

    Args:
        source: a pool.
        target: a directory without a pool.
        min_reward: the least reward, compared in float32, as it is stored.
        max_response_tokens: the longest response.
        keep: says of a trajectory that met the other conditions whether it stays.
        problems: ids of problems; those of others go.
        advance: told how many further trajectories are done, for progress; their total is that of the source.

    Raises:
        UserError: no trajectory is left, one is damaged, or the target holds a pool.
    """
    pool = Pool(source)
    rows, dropped = np.arange(len(pool)), {}
    for reason, is_good in _conditions(pool, min_reward, max_response_tokens, problems).items():
        dropped[reason] = int((~is_good[rows]).sum())
        rows = rows[is_good[rows]]
    advance(len(pool) - len(rows))
    kept = _copy([(pool, rows)], Path(target), keep, advance)
    if keep is not None:
        dropped["keep"] = len(rows) - kept
    return FilterCount(kept, dropped)


def _conditions(
    pool: Pool, min_reward: float | None, max_response_tokens: int | None, problems: Collection[str] | None
) -> dict[str, np.ndarray]:
    """[N] bool of each condition that is asked for; from the records alone."""
    conditions: dict[str, np.ndarray] = {}
    if problems is not None:
        wanted = np.array([_problem_key(problem_id.encode()) for problem_id in problems], dtype=np.uint64)
        conditions["problem"] = np.isin(pool._column("problem"), wanted)
    if min_reward is not None:
        conditions["reward"] = pool.rewards() >= np.float32(min_reward)
    if max_response_tokens is not None:
        conditions["response_tokens"] = pool.response_lengths() <= max_response_tokens
    return conditions


def _copy(
    sources: Sequence[tuple[Pool, np.ndarray]],
    target: Path,
    keep: Callable[[Trajectory], bool] | None,
    advance: Callable[[int], None],
) -> int:
    """Write these rows, ascending, to a new pool; shards of one provenance in a row become as few as they can."""
    kept = 0
    parts = [
        (shard.provenance, pool, rows[places])
        for pool, rows in sources
        for shard, places in pool._by_shard(rows, np.arange(len(rows)))
    ]
    with new_pool(target):
        for provenance, group in groupby(parts, key=lambda part: part[0]):
            with PoolWriter(target, provenance) as writer:
                for chunk, trajectories in ((c, pool.take(c)) for _, pool, rows in group for c in _chunks(rows)):
                    for trajectory in trajectories:
                        if keep is None or keep(trajectory):
                            writer.add(trajectory)
                            kept += 1
                    advance(len(chunk))
        if not kept:
            names = ", ".join(str(pool.directory) for pool, _ in sources)
            raise UserError(str(target), None, f"would be empty: no trajectory of {names} is left", "ask for less")
    return kept


# ------------------------------------------------------------------------------------------------------------ one shard


class _ShardWriter:
    def __init__(self, directory: Path, provenance: Provenance) -> None:
        self.num_rows = 0
        self._directory, self._provenance = directory, provenance
        self._final = directory / f"shard_{num_shards(directory):06d}"
        self._partial = directory / f".{self._final.name}.partial"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._partial, ignore_errors=True)  # left by a writer that was killed
            self._partial.mkdir()
            self._files: dict[str, BinaryIO] = {
                name: (self._partial / f"{name}.bin").open("wb", _BUFFER_BYTES) for name in ("rows", "data")
            }
        except OSError as error:
            raise _disk_error(directory, error) from error
        self._start = 0

    def add(self, trajectory: Trajectory) -> None:
        record, data = _encode(trajectory, self._start)
        try:
            self._files["rows"].write(record)
            self._files["data"].write(data)
        except OSError as error:
            self.abort()
            raise _disk_error(self._directory, error) from error
        self._start += len(data)
        self.num_rows += 1

    def finish(self) -> None:
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            manifest = {
                "format": FORMAT,
                "num_rows": self.num_rows,
                "bytes": {"rows.bin": self.num_rows * _RECORD.itemsize, "data.bin": self._start},
                "provenance": asdict(self._provenance),
            }
            with (self._partial / "manifest.json").open("w", encoding="utf-8") as text:
                json.dump(manifest, text, indent=1)
                text.flush()
                os.fsync(text.fileno())
            os.replace(self._partial, self._final)
            _sync(self._directory)
        except OSError as error:
            self.abort()
            raise _disk_error(self._directory, error) from error

    def abort(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk refuses what is in the buffer once more
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


class _Shard:
    def __init__(self, path: Path, *, first_row: int) -> None:
        self.path, self.manifest = path, _manifest(path)
        self.first_row, self.end = first_row, first_row + int(self.manifest["num_rows"])
        self.provenance = Provenance(**self.manifest["provenance"])
        for name, size in self.manifest["bytes"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                raise _damaged(path / name, f"has {found} bytes, the manifest says {size}")
        rows = _map(path / "rows.bin")
        if len(rows) != (self.end - first_row) * _RECORD.itemsize:
            raise _damaged(path, f"has {len(rows)} bytes of records, the manifest says {self.end - first_row} rows")
        self.records, self._rows, self._data = rows.view(_RECORD), rows.data, _map(path / "data.bin").data

    def read(self, row: int) -> Trajectory:
        """One, by its number in the pool."""
        data, (_, _, num_prompt, num_response, num_text, flags, reward, _) = self._checked(row)
        ids = np.frombuffer(data, _INT32, num_prompt + num_response).astype(np.int64)
        at, ref, mask = 4 * len(ids), None, None
        if flags & _HAS_REF:
            ref = torch.from_numpy(np.frombuffer(data, _FLOAT32, num_response, at).astype(np.float32))
            at += 4 * num_response
        if flags & _HAS_MASK:
            mask = torch.from_numpy(np.frombuffer(data, np.uint8, num_response, at).astype(bool))
            at += num_response
        return Trajectory(
            str(data[at : at + num_text], "utf-8"),
            torch.from_numpy(ids[:num_prompt]),
            torch.from_numpy(ids[num_prompt:]),
            reward,
            mask,
            ref,
        )

    def problem_id(self, row: int) -> str:
        """Of this row of the pool."""
        data, (_, _, num_prompt, num_response, num_text, flags, _, _) = self._checked(row)
        start = _text_start(num_prompt, num_response, flags)
        return str(data[start : start + num_text], "utf-8")

    def _checked(self, row: int) -> tuple[memoryview, tuple[Any, ...]]:
        """Data and record, when they are as they were written."""
        at = (row - self.first_row) * _WHOLE.size
        record = _WHOLE.unpack_from(self._rows, at)
        start, _, num_prompt, num_response, num_text, flags, _, checksum = record
        size = _text_start(num_prompt, num_response, flags) + num_text
        size += -size % 4
        is_inside = min(start, num_prompt, num_response, num_text) >= 0 and start + size <= len(self._data)
        data = self._data[start : start + size] if is_inside else self._data[:0]
        if not is_inside or zlib.crc32(data, zlib.crc32(self._rows[at : at + _HEAD.size])) != checksum:
            raise _damaged(self.path, f"row {row} of the pool has another checksum than when it was written")
        return data, record


def _encode(trajectory: Trajectory, start: int) -> tuple[bytes, bytes]:
    """Record and data of one."""
    prompt, response = trajectory.prompt_ids.numpy(), trajectory.response_ids.numpy()
    length, flags = response.size, 0
    assert length > 0, "a response has at least one token"
    assert math.isfinite(trajectory.reward), "a reward is not finite"
    parts = [prompt.astype(_INT32).tobytes(), response.astype(_INT32).tobytes()]
    if trajectory.ref_log_probs is not None:
        ref = trajectory.ref_log_probs.numpy().astype(_FLOAT32, copy=False)
        assert ref.size == length, f"{ref.size} log-probs for {length} tokens"
        assert math.isfinite(ref.sum()), "a log-prob is not finite"
        parts.append(ref.tobytes())
        flags |= _HAS_REF
    if trajectory.response_mask is not None and not (mask := trajectory.response_mask.numpy()).all():
        assert mask.size == length, f"{mask.size} entries of a mask for {length} tokens"
        parts.append(mask.astype(np.uint8).tobytes())
        flags |= _HAS_MASK
    text = trajectory.problem_id.encode()
    data = b"".join((*parts, text))
    data += bytes(-len(data) % 4)
    head = _HEAD.pack(start, _problem_key(text), prompt.size, length, len(text), flags, trajectory.reward)
    return head + zlib.crc32(data, zlib.crc32(head)).to_bytes(4, "little"), data


def _text_start(num_prompt: int, num_response: int, flags: int) -> int:
    """Where a trajectory's problem id begins, in bytes."""
    per_token = 4 + (4 if flags & _HAS_REF else 0) + (1 if flags & _HAS_MASK else 0)
    return 4 * num_prompt + per_token * num_response


def _problem_key(problem_id: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(problem_id, digest_size=8).digest(), "little")


def _chunks(rows: Any) -> Iterator[Any]:
    """Consecutive pieces of a range or an array."""
    return (rows[first : first + _CHUNK_ROWS] for first in range(0, len(rows), _CHUNK_ROWS))


# ------------------------------------------------------------------------------------------------------------ on disk


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard_[0-9]*"), key=_number) if directory.is_dir() else []


def _number(shard: Path) -> int:
    return int(shard.name.rpartition("_")[2])


def _map(path: Path) -> np.ndarray:
    """[bytes] uint8. By torch, whose mapping needs no open file: a pool may have more shards than a process files."""
    size = path.stat().st_size
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy() if size else np.zeros(0, "u1")


def _remove(shard: Path) -> None:
    """Renamed first, so that a crash halfway leaves no half shard."""
    hidden = shard if shard.name.startswith(".") else shard.with_name(f".{shard.name}.partial")
    try:
        if hidden != shard:
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(shard, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise UserError(str(shard), None, f"cannot be removed ({error.strerror})", "remove it by hand") from error


def _sync(directory: Path) -> None:
    """Else a power cut can undo a rename."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest(shard: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((shard / "manifest.json").read_text(encoding="utf-8"))
        known = {"format", "num_rows", "bytes", "provenance"} <= manifest.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(shard / "manifest.json", f"cannot be read ({error})") from error
    if not known or manifest["format"] != FORMAT:
        raise _damaged(shard / "manifest.json", f"is not of format {FORMAT}")
    return manifest


def _check_origin(
    shard: Path, manifest: Mapping[str, Any], model_digest: str | None, tokenizer_digest: str | None
) -> None:
    for what, expected in (("model", model_digest), ("tokenizer", tokenizer_digest)):
        found = manifest["provenance"][f"{what}_digest"]
        if expected is not None and found != expected:
            raise UserError(
                str(shard),
                None,
                f"comes from another {what} ({_short(found)}) than is asked for ({_short(expected)})",
                f"use a pool that was sampled with this {what}, or build it again",
            )


def _short(digest: str) -> str:
    return digest if len(digest) <= 16 else f"{digest[:16]}..."


def _damaged(path: Path, rule: str) -> UserError:
    return UserError(str(path), None, rule, "remove the shard and build it again; the others are not concerned")


def _disk_error(directory: Path, error: OSError) -> UserError:
    rule = f"could not be written ({error.strerror})"
    return UserError(str(directory), None, rule, "free disk space or choose another directory")
