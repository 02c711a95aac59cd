"""Trajectories on disk, for methods that train on stored samples: rehearsal (DPH-RL), replay (RLEP).

    pool/
        shard_000000/            whole or not there; never changed
            rows.bin             a record of 40 bytes for each trajectory: where it lies, lengths, reward, checksum
            data.bin             the trajectories, one after the other
            manifest.json        counts, sizes, provenance, its own checksum; written last
        shard_000001/

A trajectory in data.bin, filled up with zeros to a multiple of four bytes:

    prompt_ids       int32
    response_ids     int32
    ref_log_probs    float32, where they are known
    response_mask    uint8, where some tokens were not generated (a tool's output): 1 where one was
    problem_id       UTF-8

All files are mapped, none is read into memory: opening reads the manifests, a row its pages. Appending adds a shard. Each
record has the CRC-32 of itself and its trajectory, checked whenever it is read, so that a flipped bit never trains. Numbers
are little-endian.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from megatron_rl.data.shard import (
    HAS_MASK,
    HAS_REF,
    Provenance,
    Shard,
    ShardWriter,
    Trajectory,
    check_origin,
    num_shards,
    problem_key,
    read_manifest,
    remove_shard,
    shard_number,
    shard_paths,
)
from megatron_rl.errors import UserError
from megatron_rl.types import Prompt

__all__ = [
    "FilterCount",
    "Pool",
    "PoolWriter",
    "Provenance",
    "Trajectory",
    "drop_shards_after",
    "filter_pool",
    "merge",
    "new_pool",
    "num_shards",
]
SHARD_ROWS = 100_000
"""Number of rows after which a writer begins another shard."""
_CHUNK_ROWS = 256
"""Rows read at a time in a pass over all: enough to share the cost of a call, few enough for long responses."""


class PoolWriter:
    """Appends trajectories to a pool, shard by shard; what is in a finished shard survives any crash.

        with PoolWriter(directory, provenance) as writer:
            writer.add(trajectory)

    Raises:
        UserError: the pool there is of another model or tokenizer, or cannot be written.
    """

    def __init__(self, directory: str | Path, provenance: Provenance, *, shard_rows: int = SHARD_ROWS) -> None:
        """Open the pool, which is made if there is none; ``provenance`` is that of the rows to add."""
        self.directory, self._provenance, self._shard_rows = Path(directory), provenance, shard_rows
        for shard in shard_paths(self.directory):
            check_origin(shard, read_manifest(shard), *provenance.digests)
        self._shard: ShardWriter | None = None

    def add(self, trajectory: Trajectory) -> None:
        """Append one trajectory."""
        if self._shard is None:
            self._shard = ShardWriter(self.directory, self._provenance)
        self._shard.add(trajectory)
        if self._shard.num_rows == self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Finish the current shard: from now on it is part of the pool."""
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.finish()

    def __enter__(self) -> PoolWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish; after an error, keep only the shards that were finished before."""
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
        paths = shard_paths(self.directory)
        if not paths:
            raise UserError(str(directory), None, "holds no finished shard", "point at a pool, or build one first")
        self._shards: list[Shard] = []
        for path in paths:
            self._shards.append(Shard(path, first_row=self._shards[-1].end if self._shards else 0))
        self.provenance = self._shards[0].provenance
        """Provenance of the first shard; ``provenances`` has those of all."""
        for shard in self._shards:
            check_origin(shard.path, shard.manifest, model_digest, tokenizer_digest)
            check_origin(shard.path, shard.manifest, *self.provenance.digests)
        self._ends = np.array([shard.end for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        """Return one trajectory, or a list of them for a slice."""
        return self.take(range(*index.indices(len(self)))) if isinstance(index, slice) else self.take([index])[0]

    def __iter__(self) -> Iterator[Trajectory]:
        for rows in _chunks(range(len(self))):
            yield from self.take(rows)

    def take(self, indices: Sequence[int] | np.ndarray) -> list[Trajectory]:
        """Read trajectories by number, in this order, each checked against its checksum.

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
        """Return [N] float32, without reading the trajectories."""
        return self._column("reward")

    def prompt_lengths(self) -> np.ndarray:
        """Return [N] int32 tokens, without reading the trajectories."""
        return self._column("prompt_length")

    def response_lengths(self) -> np.ndarray:
        """Return [N] int32 tokens, without reading the trajectories."""
        return self._column("response_length")

    def has_ref_log_probs(self) -> np.ndarray:
        """Return [N] bool, without reading the trajectories."""
        return (self._column("flags") & HAS_REF).astype(bool)

    def has_response_masks(self) -> np.ndarray:
        """Return [N] bool: some tokens of the response were not generated."""
        return (self._column("flags") & HAS_MASK).astype(bool)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that depend on all content, by way of the checksums."""
        hashes = hashlib.blake2b(digest_size=8)
        for shard in self._shards:
            hashes.update(shard.records.tobytes())
        return hashes.hexdigest()

    def rows_of_problems(self) -> dict[str, list[int]]:
        """Return the row numbers of each problem, ascending; problems in order of first occurrence.

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
        """Return the different provenances of its shards, in order."""
        found: list[Provenance] = []
        for shard in self._shards:
            if shard.provenance not in found:
                found.append(shard.provenance)
        return found

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    @property
    def num_bytes(self) -> int:
        """Size on disk, manifests left out."""
        return sum(sum(shard.manifest["bytes"].values()) for shard in self._shards)

    def verify(self) -> Iterator[int]:
        """Read everything; yield the number of each trajectory that is whole, some hundred at a time.

        Raises:
            UserError: the first that is not.
        """
        for rows in _chunks(range(len(self))):
            self.take(rows)
            yield from rows

    def _by_shard(self, numbers: np.ndarray, order: np.ndarray) -> Iterator[tuple[Shard, np.ndarray]]:
        """Yield each shard that holds some of the rows, and their places in ``numbers``, in the order of ``order``."""
        which = np.searchsorted(self._ends, numbers[order], side="right")
        for i in np.unique(which):
            yield self._shards[i], order[which == i]

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([shard.records[name] for shard in self._shards])


# ---------------------------------------------------------------------------------------------------------- whole pools


def drop_shards_after(directory: str | Path, count: int) -> None:
    """Remove the shards numbered ``count`` and above, and what a killed writer has left.

    For work that notes ``num_shards`` after each finished piece: what was written after the last note is repeated.
    """
    folder = Path(directory)
    late = [path for path in shard_paths(folder) if shard_number(path) >= count]
    for path in [*folder.glob(".shard_*.partial"), *reversed(late)]:  # from the end: a crash leaves no gap
        remove_shard(path)


@contextmanager
def new_pool(directory: str | Path) -> Iterator[None]:
    """Guard the building of a pool in a folder without one: after an error nothing of it is left.

    Raises:
        UserError: a pool is there.
    """
    target = Path(directory)
    if shard_paths(target):
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
    """Write a new pool of all trajectories of some pools, in order; return their number.

    Args:
        sources: pools, all of one model and tokenizer.
        target: a directory without a pool.
        advance: told how many further trajectories are done, for progress.

    Raises:
        UserError: they are not of one model and tokenizer, one is damaged, or the target holds a pool.
    """
    pools: list[Pool] = []
    for source in sources:
        pools.append(Pool(source))
        for shard in pools[-1]._shards:
            check_origin(shard.path, shard.manifest, *pools[0].provenance.digests)
    return _copy([(pool, np.arange(len(pool))) for pool in pools], Path(target), None, advance)


@dataclass(frozen=True)
class FilterCount:
    """The result of a filter."""

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
    """Write a new pool of the trajectories that meet every condition given, in their order.

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
    """Return [N] bool for each condition that is asked for; only the records are read."""
    conditions: dict[str, np.ndarray] = {}
    if problems is not None:
        wanted = np.array([problem_key(problem_id.encode()) for problem_id in problems], dtype=np.uint64)
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


def _chunks(rows: Any) -> Iterator[Any]:
    """Yield consecutive pieces of a range or an array."""
    return (rows[first : first + _CHUNK_ROWS] for first in range(0, len(rows), _CHUNK_ROWS))


@dataclass(frozen=True)
class PoolNeed:
    """The pool of stored samples that an algorithm trains on."""

    field: str
    """Config key that names it, for errors."""
    directory: str
    of_this_model: bool
    """True: its samples must be of the policy's initial weights, not only of its tokenizer."""
    use: Callable[[Pool, Sequence[Prompt]], str]
    """Takes the pool and the prompts of the run; returns a line for the user. Raises ``UserError`` if nothing in it can be
    used."""
