"""Entries of ``data.train`` and keys like it, taken apart: a file, a folder or a set on the hub, perhaps a slice of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import UserError

FILES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_IN_FOLDERS = (*FILES, ".arrow")
_SLICE = re.compile(r"(?P<path>.*[^\[\]])\[(?P<start>-?\d*):(?P<stop>-?\d*)\]", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class Spec:
    """One entry of a key that names problems, taken apart."""

    text: str
    """The entry as it was given."""
    path: str
    start: int | None
    stop: int | None

    @property
    def is_local(self) -> bool:
        """There is such a file or folder."""
        return os.path.exists(self.path)

    @property
    def looks_like_hub(self) -> bool:
        """``ORGANISATION/NAME``, which a path may be as well: ``is_local`` comes first."""
        return _HUB_ID.fullmatch(self.path) is not None and not self.path.endswith(FILES)


def parse_spec(text: str, field: str) -> Spec:
    """Take apart ``path``, ``path[a:b]``, ``ORGANISATION/NAME:SUBSET:SPLIT[a:b]``. Files whose names end in brackets exist.

    Raises:
        UserError: there is neither such a file or folder, nor can it be a set on the hub.
    """
    match = None if os.path.exists(text) else _SLICE.fullmatch(text)
    if match is None:
        spec = Spec(text, text, None, None)
    else:
        start, stop = (int(bound) if bound not in ("", "-") else None for bound in (match["start"], match["stop"]))
        spec = Spec(text, match["path"], start, stop)
    if not (spec.is_local or spec.looks_like_hub):
        raise UserError(
            field, text, "is no file or folder here", "give the path of a problem file, or the id of a set on the hub"
        )
    if Path(spec.path).is_file() and not spec.path.endswith(FILES):
        raise UserError(field, text, f"must end in {', '.join(FILES)}", "name a problem file")
    if Path(spec.path).is_dir() and not any(file.name.endswith(_IN_FOLDERS) for file in Path(spec.path).rglob("*")):
        raise UserError(
            field, text, "holds no problem file", f"name a folder with files that end in {', '.join(FILES)}"
        )
    return spec
