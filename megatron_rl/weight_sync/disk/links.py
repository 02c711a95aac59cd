"""Links of a delta chain on disk: their manifests, and the removal of links that are no longer needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.disk.frames import Frame

LinkKind = Literal["full", "delta"]
MANIFEST, DATA = "manifest.json", "data"
FORMAT = 1

_LINK = re.compile(r"(\d{8,})\.(full|delta)")
_LEFT_OVER = re.compile(r"\.\d{8,}\.(full|delta)\.(partial|removed)")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a link."""

    dtype: str
    """Torch's name without ``torch.``."""
    shape: Extent
    before: str | None
    """Digest of the version that a delta starts from, in hexadecimal."""
    after: str
    """Digest of this version."""
    offset: int
    """First byte in ``data``."""
    frames: tuple[Frame, ...]
    """Frames of a delta, one behind the other; a full link has the tensor's bytes."""


@dataclass(frozen=True)
class ChainLink:
    """The manifest of one link."""

    path: Path
    kind: LinkKind
    version: int
    previous: int | None
    """Version that a delta starts from."""
    before: str | None
    """State of that version."""
    after: str
    """State of this version (``state_of``)."""
    data_bytes: int
    tensors: dict[str, StoredTensor]


def link_name(version: int, kind: LinkKind) -> str:
    """Return the name of a link's directory."""
    return f"{version:08d}.{kind}"


def state_of(digests: Mapping[str, str]) -> str:
    """Return one number for all tensors of a version: equal names and digests give equal states."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def find_links(directory: Path) -> dict[tuple[int, LinkKind], Path]:
    """Return the paths of all links; none of them is opened.

    Raises:
        UserError: the directory cannot be read.
    """
    try:
        found = [(match, path) for path in directory.iterdir() if (match := _LINK.fullmatch(path.name))]
    except OSError as error:
        raise UserError(
            str(directory), None, f"cannot be read ({error.strerror})", "give the directory that the trainer writes to"
        ) from error
    return {(int(match[1]), "full" if match[2] == "full" else "delta"): path for match, path in found}


def newest_version(directory: Path) -> int | None:
    """Return the newest version of the links; None without any."""
    return max((version for version, _ in find_links(directory)), default=None)


def write_manifest(directory: Path, link: ChainLink) -> None:
    """Write a manifest into the link's current directory. Not synced to disk."""
    content = {key: value for key, value in asdict(link).items() if key != "path"} | {"format": FORMAT}
    # One line a tensor would be nicer to look at, and ten times as slow to read.
    text = json.dumps({"checksum": _checksum(content), "content": content})
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def read_link(path: Path) -> ChainLink:
    """Read and check a manifest, and that the data has its size.

    Raises:
        UserError: the link is missing, damaged, or not that of its name.
    """
    try:
        document = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        data_bytes = (path / DATA).stat().st_size
    except FileNotFoundError as error:
        raise broken(path, f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise broken(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise broken(path, f"{MANIFEST} is damaged") from error
    content = document.get("content") if isinstance(document, dict) else None
    if not isinstance(content, dict) or _checksum(content) != document.get("checksum"):
        raise broken(path, f"{MANIFEST} is damaged")
    if content.pop("format", None) != FORMAT:
        raise UserError(
            str(path), None, "was written in another format", "use one release for the trainer and the servers"
        )
    tensors = {name: _stored(fields) for name, fields in content.pop("tensors").items()}
    link = ChainLink(path=path, tensors=tensors, **content)
    if path.name != link_name(link.version, link.kind):
        raise broken(path, f"holds {link_name(link.version, link.kind)}: links were renamed or are out of order")
    if data_bytes != link.data_bytes:
        raise broken(path, f"{DATA} has {data_bytes} bytes instead of {link.data_bytes}")
    return link


def broken(path: Path, rule: str) -> UserError:
    """Return the error about a link that cannot be used."""
    return UserError(str(path), None, rule, "let the trainer write a full link, or copy the directory again")


def remove_older(directory: str | Path, oldest: int | None = None) -> list[Path]:
    """Remove links that version ``oldest`` and later ones do not need, and remains of killed writers.

    The needed links start with the newest full link up to ``oldest``. The trainer's writer calls this between two writes.

    Args:
        directory: of the links.
        oldest: by default the newest version.

    Returns:
        The removed paths.
    """
    directory = Path(directory)
    links = find_links(directory)
    newest = max((version for version, _ in links), default=0)
    limit = newest if oldest is None else oldest
    first = max((version for version, kind in links if kind == "full" and version <= limit), default=0)
    # A delta of the full link's own version goes, too: only servers that have the version before could use it.
    unneeded = [links[key] for key in sorted(links) if key < (first, "full")]
    left_over = [path for path in directory.iterdir() if _LEFT_OVER.fullmatch(path.name)]
    return _remove(unneeded) + _remove(left_over)


def remove_newer(directory: str | Path, version: int) -> list[Path]:
    """Remove links of this version and later ones: a run that is resumed before them writes them anew.

    Returns:
        The removed paths, newest first, so that after an interruption the rest is still a chain.
    """
    links = find_links(Path(directory))
    return _remove(links[key] for key in sorted(links, reverse=True) if key[0] >= version)


def _remove(paths: Iterable[Path]) -> list[Path]:
    removed = []
    for path in paths:
        doomed = path
        if not path.name.startswith("."):
            # The rename hides it from readers at once; readers that have opened its files keep them.
            doomed = path.with_name(f".{path.name}.removed")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
        shutil.rmtree(doomed)
        removed.append(path)
    return removed


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _stored(fields: dict[str, Any]) -> StoredTensor:
    frames = tuple(Frame(*values) for values in fields.pop("frames"))
    return StoredTensor(shape=tuple(fields.pop("shape")), frames=frames, **fields)
