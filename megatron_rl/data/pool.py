"""Trajectories on disk, for methods that train on stored samples: rehearsal (DPH-RL), replay (RLEP).

    pool/
        shard_000000/            whole or not there; never changed
            rows.bin             one fixed record a trajectory: where its parts lie, reward, checksum
            prompt_ids.bin       int32, all prompts in a row
            response_ids.bin     int32
            response_mask.bin    uint8: 1 where a token was generated (not, say, a tool's output)
            ref_log_probs.bin    float32, NaN where unknown
            texts.bin            problem ids, UTF-8
            manifest.json        counts, sizes, provenance; written last
        shard_000001/

Everything is mapped, nothing is held: opening costs the manifests, a row costs its pages. Appending adds a shard. Each record
has the CRC-32 of itself and its trajectory, checked whenever it is read, so that a flipped bit never trains.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from megatron_rl.errors import UserError

FORMAT = 1
SHARD_ROWS = 100_000
"""A writer begins another shard after so many."""

_RECORD = np.dtype(
    [
        ("prompt_start", "<i8"), ("response_start", "<i8"), ("text_start", "<i8"), ("prompt_length", "<i4"),
        ("response_length", "<i4"), ("text_length", "<i4"), ("reward", "<f4"), ("checksum", "<u4"), ("reserved", "<u4"),
    ]
)  # fmt: skip
_COLUMNS: dict[str, np.dtype[Any]] = {
    "prompt_ids": np.dtype("<i4"), "response_ids": np.dtype("<i4"), "response_mask": np.dtype("u1"),
    "ref_log_probs": np.dtype("<f4"), "texts": np.dtype("u1"),
}  # fmt: skip


@dataclass(frozen=True)
class Provenance:
    """Where a shard's trajectories come from. Shards of one pool share model and tokenizer."""

    task: str
    model_digest: str
    """Of the weights that sampled them (and gave ``ref_log_probs``, where there are some)."""
    tokenizer_digest: str
    sampling: Mapping[str, float] = field(default_factory=dict)
    """``temperature``, ``top_p``, ``top_k``, ``max_new_tokens``."""


@dataclass(frozen=True)
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
            _check_same_origin(shard, _manifest(shard), provenance)
        self._shard: _ShardWriter | None = None

    def add(self, trajectory: Trajectory) -> None:
        """Append one."""
        _check(trajectory)
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
        expected: model and tokenizer that it must be of; None takes any.

    Raises:
        UserError: no pool, a shard that is damaged or cut off, or of another model or tokenizer. From reading a trajectory: it
            is damaged.
    """

    def __init__(self, directory: str | Path, *, expected: Provenance | None = None) -> None:
        self.directory = Path(directory)
        self._shards = [_Shard(path) for path in _shards(self.directory)]
        if not self._shards:
            raise UserError(str(directory), None, "holds no finished shard", "point at a pool, or build one first")
        first = self._shards[0]
        for shard in self._shards:
            _check_same_origin(shard.path, shard.manifest, expected or first.provenance)
        self.provenance = first.provenance
        self._ends = np.cumsum([shard.num_rows for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        """One trajectory, checked against its checksum; or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, number, side="right"))
        return self._shards[which].read(number - (int(self._ends[which - 1]) if which else 0))

    def rewards(self) -> np.ndarray:
        """[N] float32, without reading the trajectories."""
        return np.concatenate([shard.records["reward"] for shard in self._shards])

    def response_lengths(self) -> np.ndarray:
        """[N] int32, likewise."""
        return np.concatenate([shard.records["response_length"] for shard in self._shards])

    def verify(self) -> Iterator[int]:
        """Read everything; yields the number of each trajectory that is whole.

        Raises:
            UserError: the first that is not.
        """
        for number in range(len(self)):
            self[number]
            yield number


def merge(sources: Iterable[str | Path], target: str | Path) -> int:
    """Append all trajectories of some pools to another; returns how many. All must be of one model and tokenizer.

    Raises:
        UserError: they are not, or one is damaged.
    """
    pools = [Pool(source) for source in sources]
    count = 0
    with PoolWriter(target, pools[0].provenance) as writer:
        for pool in pools:
            for shard in pool._shards:
                _check_same_origin(shard.path, shard.manifest, pools[0].provenance)
        for pool in pools:
            for trajectory in pool:
                writer.add(trajectory)
                count += 1
    return count


# ------------------------------------------------------------------------------------------------------------ one shard


class _ShardWriter:
    def __init__(self, directory: Path, provenance: Provenance) -> None:
        self.num_rows = 0
        self._directory, self._provenance = directory, provenance
        numbers = [int(path.name.rpartition("_")[2]) for path in _shards(directory)]
        self._final = directory / f"shard_{max(numbers, default=-1) + 1:06d}"
        self._partial = directory / f".{self._final.name}.partial"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._partial, ignore_errors=True)  # left by a writer that was killed
            self._partial.mkdir()
            self._files: dict[str, BinaryIO] = {
                name: (self._partial / f"{name}.bin").open("wb") for name in ("rows", *_COLUMNS)
            }
        except OSError as error:
            raise _disk_error(directory, error) from error
        self._counts = dict.fromkeys(_COLUMNS, 0)

    def add(self, trajectory: Trajectory) -> None:
        columns = _columns(trajectory)
        record = np.zeros((), dtype=_RECORD)
        for kind in ("prompt", "response"):
            record[f"{kind}_start"] = self._counts[f"{kind}_ids"]
            record[f"{kind}_length"] = len(columns[f"{kind}_ids"])
        record["text_start"], record["text_length"] = self._counts["texts"], len(columns["texts"])
        record["reward"] = trajectory.reward
        record["checksum"] = _checksum(record, columns)
        try:
            for name, values in columns.items():
                self._files[name].write(values.tobytes())
                self._counts[name] += len(values)
            self._files["rows"].write(record.tobytes())
        except OSError as error:
            self.abort()
            raise _disk_error(self._directory, error) from error
        self.num_rows += 1

    def finish(self) -> None:
        manifest = {
            "format": FORMAT,
            "num_rows": self.num_rows,
            "bytes": {f"{name}.bin": file.tell() for name, file in self._files.items()},
            "provenance": asdict(self._provenance),
        }
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            with (self._partial / "manifest.json").open("w", encoding="utf-8") as text:
                json.dump(manifest, text, indent=1)
                text.flush()
                os.fsync(text.fileno())
            os.replace(self._partial, self._final)
        except OSError as error:
            self.abort()
            raise _disk_error(self._directory, error) from error

    def abort(self) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


class _Shard:
    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, _manifest(path)
        self.num_rows = int(self.manifest["num_rows"])
        self.provenance = Provenance(**self.manifest["provenance"])
        for name, size in self.manifest["bytes"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                raise _damaged(path / name, f"has {found} bytes, the manifest says {size}")
        self.records = self._map("rows", _RECORD)
        self._columns: dict[str, np.ndarray] = {name: self._map(name, dtype) for name, dtype in _COLUMNS.items()}

    def _map(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        path = self.path / f"{name}.bin"
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    def read(self, number: int) -> Trajectory:
        record = self.records[number]
        columns = {name: self._slice(name, record) for name in _COLUMNS}
        if _checksum(record, columns) != record["checksum"]:
            raise _damaged(self.path, f"trajectory {number} has another checksum than when it was written")
        response_mask, ref = columns["response_mask"], columns["ref_log_probs"]
        return Trajectory(
            problem_id=bytes(columns["texts"]).decode(),
            prompt_ids=torch.from_numpy(columns["prompt_ids"].astype(np.int64)),
            response_ids=torch.from_numpy(columns["response_ids"].astype(np.int64)),
            reward=float(record["reward"]),
            response_mask=None if response_mask.all() else torch.from_numpy(response_mask.astype(bool)),
            ref_log_probs=None if np.isnan(ref).any() else torch.from_numpy(ref.astype(np.float32)),
        )

    def _slice(self, name: str, record: np.void) -> np.ndarray:
        kind = {"prompt_ids": "prompt", "texts": "text"}.get(name, "response")
        start, length = int(record[f"{kind}_start"]), int(record[f"{kind}_length"])
        if start < 0 or length < 0 or start + length > len(self._columns[name]):
            raise _damaged(self.path, f"a record points beyond {name}.bin")
        return self._columns[name][start : start + length]


def _columns(trajectory: Trajectory) -> dict[str, np.ndarray]:
    length = len(trajectory.response_ids)
    mask = np.ones(length, "u1") if trajectory.response_mask is None else trajectory.response_mask.numpy().astype("u1")
    ref = np.full(length, np.nan) if trajectory.ref_log_probs is None else trajectory.ref_log_probs.numpy()
    return {
        "prompt_ids": trajectory.prompt_ids.numpy().astype("<i4"),
        "response_ids": trajectory.response_ids.numpy().astype("<i4"),
        "response_mask": mask,
        "ref_log_probs": ref.astype("<f4"),
        "texts": np.frombuffer(trajectory.problem_id.encode(), dtype="u1"),
    }


def _checksum(record: np.ndarray | np.void, columns: Mapping[str, np.ndarray]) -> int:
    blank = np.zeros((), dtype=_RECORD)
    blank[...] = record
    blank["checksum"] = 0
    value = zlib.crc32(blank.tobytes())
    for name in _COLUMNS:
        value = zlib.crc32(np.ascontiguousarray(columns[name]).tobytes(), value)
    return value


def _check(trajectory: Trajectory) -> None:
    """Our own code made it: lengths agree, and what would read back as "unknown" is not there."""
    length = len(trajectory.response_ids)
    assert length > 0, "a response has at least one token"
    for vector in (trajectory.response_mask, trajectory.ref_log_probs):
        assert vector is None or len(vector) == length, f"{len(vector)} entries for {length} tokens"
    assert trajectory.ref_log_probs is None or bool(trajectory.ref_log_probs.isfinite().all()), (
        "a log-prob is not finite"
    )


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard_[0-9]*")) if directory.is_dir() else []


def _manifest(shard: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((shard / "manifest.json").read_text(encoding="utf-8"))
        known = {"format", "num_rows", "bytes", "provenance"} <= manifest.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(shard / "manifest.json", f"cannot be read ({error})") from error
    if not known or manifest["format"] != FORMAT:
        raise _damaged(shard / "manifest.json", f"is not of format {FORMAT}")
    return manifest


def _check_same_origin(shard: Path, manifest: Mapping[str, Any], expected: Provenance) -> None:
    for name in ("model_digest", "tokenizer_digest"):
        if manifest["provenance"][name] != getattr(expected, name):
            raise UserError(
                str(shard),
                manifest["provenance"][name],
                f"comes from another {name.removesuffix('_digest')} than {getattr(expected, name)}",
                "use a pool that was sampled from this model with this tokenizer",
            )


def _damaged(path: Path, rule: str) -> UserError:
    return UserError(str(path), None, rule, "remove the shard and build it again; the others are not concerned")


def _disk_error(directory: Path, error: OSError) -> UserError:
    rule = f"could not be written ({error.strerror})"
    return UserError(str(directory), None, rule, "free disk space or choose another directory")
