"""One shard of a pool on disk: its two files, its manifest, and their checks. pool.py describes the format."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from megatron_rl.errors import UserError, described
from megatron_rl.files import disk_errors, publish_folder

FORMAT = 3

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
HAS_REF, HAS_MASK = 1, 2
_BUFFER_BYTES = 2**22
_SHARD = re.compile(r"shard_\d{6,}")
"""Names of finished shards; a user's copy beside them has another."""


@dataclass(frozen=True)
class Provenance:
    """The origin of a shard's trajectories. Shards of one pool share model and tokenizer."""

    task: str
    model_digest: str
    """Digest of the weights that sampled them (and gave ``ref_log_probs``, if there are some)."""
    tokenizer_digest: str
    sampling: Mapping[str, float] = field(default_factory=dict)
    """``temperature``, ``top_p``, ``top_k``, ``max_new_tokens``."""

    @property
    def digests(self) -> tuple[str, str]:
        """Digests of model and tokenizer, which the shards of one pool must share."""
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
    """[R] float32 of the reference, at the sampling temperature; None: unknown."""


class ShardWriter:
    """Writes the next shard of a pool; until ``finish`` it is not part of it.

    Raises:
        UserError: from every method, it cannot be written.
    """

    def __init__(self, directory: Path, provenance: Provenance) -> None:
        self.num_rows = 0
        self._directory, self._provenance = directory, provenance
        self._final = directory / f"shard_{num_shards(directory):06d}"
        self._partial = directory / f".{self._final.name}.partial"
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._partial, ignore_errors=True)  # left by a writer that was killed
            self._partial.mkdir()
            self._files: dict[str, BinaryIO] = {
                name: (self._partial / f"{name}.bin").open("wb", _BUFFER_BYTES) for name in ("rows", "data")
            }
        self._start = 0

    def add(self, trajectory: Trajectory) -> None:
        """Append one trajectory."""
        record, data = _encode(trajectory, self._start)
        with self._writing():
            self._files["rows"].write(record)
            self._files["data"].write(data)
        self._start += len(data)
        self.num_rows += 1

    def finish(self) -> None:
        """Make the shard part of the pool."""
        with self._writing():
            for file in self._files.values():
                file.close()
            manifest = {
                "format": FORMAT,
                "num_rows": self.num_rows,
                "bytes": {"rows.bin": self.num_rows * _RECORD.itemsize, "data.bin": self._start},
                "provenance": asdict(self._provenance),
            }
            (self._partial / "manifest.json").write_bytes(_with_checksum(manifest))
            publish_folder(self._partial, self._final)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with disk_errors(self._directory):
                yield
        except UserError:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove the unfinished shard."""
        for file in self._files.values():
            with suppress(OSError):  # a full disk refuses what is in the buffer once more
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


class Shard:
    """A finished shard, mapped.

    Raises:
        UserError: it is damaged or cut off; from reading a row: that is damaged.
    """

    def __init__(self, path: Path, *, first_row: int) -> None:
        self.path, self.manifest = path, read_manifest(path)
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
        """Read one trajectory, by its number in the pool."""
        data, (_, _, num_prompt, num_response, num_text, flags, reward, _) = self._checked(row)
        ids = np.frombuffer(data, _INT32, num_prompt + num_response).astype(np.int64)
        at, ref, mask = 4 * len(ids), None, None
        if flags & HAS_REF:
            ref = torch.from_numpy(np.frombuffer(data, _FLOAT32, num_response, at).astype(np.float32))
            at += 4 * num_response
        if flags & HAS_MASK:
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
        """Read the problem id of this row of the pool."""
        data, (_, _, num_prompt, num_response, num_text, flags, _, _) = self._checked(row)
        start = _text_start(num_prompt, num_response, flags)
        return str(data[start : start + num_text], "utf-8")

    def _checked(self, row: int) -> tuple[memoryview, tuple[Any, ...]]:
        """Return data and record after checking that they are as they were written."""
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
    """Return record and data of one trajectory."""
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
        flags |= HAS_REF
    if trajectory.response_mask is not None and not (mask := trajectory.response_mask.numpy()).all():
        assert mask.size == length, f"{mask.size} entries of a mask for {length} tokens"
        parts.append(mask.astype(np.uint8).tobytes())
        flags |= HAS_MASK
    text = trajectory.problem_id.encode()
    data = b"".join((*parts, text))
    data += bytes(-len(data) % 4)
    head = _HEAD.pack(start, problem_key(text), prompt.size, length, len(text), flags, trajectory.reward)
    return head + zlib.crc32(data, zlib.crc32(head)).to_bytes(4, "little"), data


def _text_start(num_prompt: int, num_response: int, flags: int) -> int:
    """Return the position of a trajectory's problem id, in bytes."""
    per_token = 4 + (4 if flags & HAS_REF else 0) + (1 if flags & HAS_MASK else 0)
    return 4 * num_prompt + per_token * num_response


def problem_key(problem_id: bytes) -> int:
    """Return the hash of a problem's id that a record holds."""
    return int.from_bytes(hashlib.blake2b(problem_id, digest_size=8).digest(), "little")


# ------------------------------------------------------------------------------------------------------------ on disk


def num_shards(directory: str | Path) -> int:
    """Return the next shard's number: that of all shards ever finished, also of those removed since."""
    return max((shard_number(path) for path in shard_paths(Path(directory))), default=-1) + 1


def shard_paths(directory: Path) -> list[Path]:
    """Return the finished shards of a pool, in order."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in found if _SHARD.fullmatch(path.name)), key=shard_number)


def shard_number(shard: Path) -> int:
    """Read the number of a shard from its name."""
    return int(shard.name.rpartition("_")[2])


def _map(path: Path) -> np.ndarray:
    """Map a file as [bytes] uint8. Torch's mapping keeps no file open: a pool may have more shards than a process may open."""
    size = path.stat().st_size
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy() if size else np.zeros(0, "u1")


def remove_shard(shard: Path) -> None:
    """Remove a shard. It is renamed first, so that a crash halfway leaves no half shard."""
    hidden = shard if shard.name.startswith(".") else shard.with_name(f".{shard.name}.partial")
    try:
        if hidden != shard:
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(shard, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise UserError(str(shard), None, f"cannot be removed ({error.strerror})", "remove it by hand") from error


def read_manifest(shard: Path) -> dict[str, Any]:
    """Read a manifest and check that it is as it was written."""
    try:
        data = (shard / "manifest.json").read_bytes()
        manifest = json.loads(data)
        is_ours = manifest["format"] == FORMAT
        manifest.pop("checksum", None)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(shard / "manifest.json", f"cannot be read ({described(error)})") from error
    if not is_ours:
        raise _damaged(shard / "manifest.json", f"is not of format {FORMAT}")
    if _with_checksum(manifest) != data:
        raise _damaged(shard / "manifest.json", "has another checksum than when it was written")
    return manifest


def _with_checksum(manifest: Mapping[str, Any]) -> bytes:
    """Return the text of a manifest, which ends with a checksum over the rest."""
    checksum = zlib.crc32(json.dumps(manifest, indent=1).encode())
    return json.dumps({**manifest, "checksum": checksum}, indent=1).encode()


def check_origin(
    shard: Path, manifest: Mapping[str, Any], model_digest: str | None, tokenizer_digest: str | None
) -> None:
    """Check that the shard is of this model and tokenizer; None takes any."""
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
