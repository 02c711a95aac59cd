"""``digests.json``: the tensors of a converted checkpoint, under Hugging Face names whatever its format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_rl.convert.hf.mapped import dtype_of
from megatron_rl.convert.tables.digest import as_text
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.errors import UserError

MANIFEST_FILE = "digests.json"


@dataclass(frozen=True)
class Fingerprint:
    """One HF tensor: equal ones have equal bits, but for a chance of 2^-64."""

    dtype: str
    shape: Extent
    digest: int
    """Result of ``digest`` over the whole tensor."""

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return prod(self.shape) * dtype_of(self.dtype).itemsize


def write_manifest(path: Path, tensors: Mapping[str, Fingerprint]) -> None:
    """Write ``digests.json``."""
    rows = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "bytes": t.num_bytes, "digest": as_text(t.digest)}
        for name, t in tensors.items()
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    path.write_text(f'{{"version": 1, "tensors": {{\n{lines}\n}}}}\n', encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Fingerprint]:
    """Read ``digests.json``.

    Raises:
        UserError: it is missing or not one.
    """
    fix = "compare with another directory instead, or convert the checkpoint again"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["version"] != 1:
            raise ValueError(f"version {fields['version']}")
        return {
            name: Fingerprint(row["dtype"], tuple(row["shape"]), int(row["digest"], 16))
            for name, row in fields["tensors"].items()
        }
    except FileNotFoundError as error:
        raise UserError(str(path), None, "is missing: nothing says what the checkpoint should hold", fix) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(path), None, f"is no digest manifest ({error!r})", fix) from error


def differences(expected: Mapping[str, Fingerprint], found: Mapping[str, Fingerprint]) -> list[str]:
    """Return one line for each tensor that differs, in the order of ``expected``; empty: all are equal."""
    lines = []
    for name, one in expected.items():
        other = found.get(name)
        if other is None:
            lines.append(f"{name}: missing")
        elif one.shape != other.shape:
            lines.append(f"{name}: shape {list(other.shape)}, expected {list(one.shape)}")
        elif one.dtype != other.dtype:
            lines.append(f"{name}: {other.dtype}, expected {one.dtype}")
        elif one.digest != other.digest:
            lines.append(f"{name}: digest {as_text(other.digest)}, expected {as_text(one.digest)}")
    return lines + [f"{name}: not expected" for name in found if name not in expected]
