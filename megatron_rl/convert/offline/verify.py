"""Verification of a checkpoint: digests of all its tensors against its manifest, or against another checkpoint's."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_rl.convert.architecture.shape import Dtype
from megatron_rl.convert.hf.mapped import dtype_name, dtype_of
from megatron_rl.convert.offline.convert import block_digests, default_threads
from megatron_rl.convert.offline.manifest import MANIFEST_FILE, Fingerprint, differences, read_manifest
from megatron_rl.convert.offline.partial import threads
from megatron_rl.convert.offline.reporter import Reporter
from megatron_rl.convert.offline.sources import HFSource, MegatronSource, num_bytes, open_source
from megatron_rl.convert.tables.digest import MASK
from megatron_rl.convert.tables.table import float32_tensors


def fingerprints(
    source: HFSource | MegatronSource,
    *,
    dtype: Dtype | None = None,
    num_threads: int | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Fingerprint]:
    """Read every tensor of a checkpoint once.

    Args:
        source: the checkpoint.
        dtype: digest the values cast to this type, except for what checkpoints keep in float32; None: as stored.
        num_threads: tensors read at a time.
        reporter: for progress.
    """
    reporter = reporter or Reporter()
    kept = float32_tensors(source.shape)

    def of(name: str) -> Fingerprint:
        wanted = source.dtype(name) if dtype is None or name in kept else dtype_of(dtype)
        total = 0
        for value, size in block_digests(source, name, wanted):
            total = (total + value) & MASK
            reporter.advance(size)
        return Fingerprint(dtype_name(wanted), source.extents[name], total)

    reporter.begin(f"digests of {source.directory.name}", num_bytes(source))
    with threads(num_threads or default_threads()) as pool:
        found = dict(zip(source.extents, pool.map(of, source.extents), strict=True))
    reporter.end()
    return found


def verify(
    directory: str | Path,
    other: str | Path | None = None,
    *,
    config_from: str | Path | None = None,
    dtype: Dtype | None = None,
    is_fresh: bool = False,
    num_threads: int | None = None,
    reporter: Reporter | None = None,
) -> list[str]:
    """Return one line for each tensor that is not as it should be; empty: every bit is.

    Args:
        directory: a checkpoint, Hugging Face or Megatron.
        other: another one, of either format; None: the manifest in ``directory``.
        config_from: where config.json is, if a Megatron checkpoint does not bring it along.
        dtype: compare values cast to this type: the original with a conversion that was cast.
        is_fresh: read from the disk, not from what the system remembers of it.
        num_threads: tensors read at a time.
        reporter: for progress.

    Raises:
        UserError: one of them is no complete checkpoint, or there is nothing to compare with.
    """
    source = open_source(directory, config_from=config_from)
    if other is None:
        expected = read_manifest(source.directory / MANIFEST_FILE)
    else:
        expected = fingerprints(
            open_source(other, config_from=config_from), dtype=dtype, num_threads=num_threads, reporter=reporter
        )
    if is_fresh:
        _forget(source.files)
    return differences(expected, fingerprints(source, dtype=dtype, num_threads=num_threads, reporter=reporter))


def _forget(files: list[Path]) -> None:
    """Let the system drop what it holds of these files, so that the next read shows what the disk holds."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
