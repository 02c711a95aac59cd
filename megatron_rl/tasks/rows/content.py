"""Digests of problem files: whether a run that goes on reads what it has read before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.files import content_digest
from megatron_rl.tasks.rows.spec import parse_spec


def rows_digest(texts: Sequence[str], *, field: str = "data.train") -> str:
    """Return a digest of the content of problem files; a set on the hub counts by its name, and files may move.

    Args:
        texts: as ``parse_spec`` takes them.
        field: config key, for errors.

    Raises:
        UserError: one is not there.
    """
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        spec = parse_spec(text, field)
        content = content_digest(Path(spec.path)) if spec.is_local else spec.path
        digest.update(f"{content} {spec.start}:{spec.stop}\n".encode())
    return digest.hexdigest()
