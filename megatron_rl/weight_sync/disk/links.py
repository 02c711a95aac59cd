"""Links on disk: their manifests, read and checked; and the removal of those that nobody needs."""

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
    """As torch names it, without ``torch.``."""
    shape: Extent
    before: str | None
    """Digest of the version that a delta starts from, in hexadecimal."""
    after: str
    """Digest of this version."""
    offset: int
    """First byte in ``data``."""
    frames: tuple[Frame, ...]
    """Of a delta, one behind the other; a full link has the tensor's bytes."""


@dataclass(frozen=True)
class ChainLink:
    """What a manifest says."""

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
    """Name of a link's directory."""
    return f"{version:08d}.{kind}"


def state_of(digests: Mapping[str, str]) -> str:
    """One number for all tensors of a version: equal names and digests give equal states."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def find_links(directory: Path) -> dict[tuple[int, LinkKind], Path]:
    """Paths of all links, none of which has been opened.

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
    """Of the links; None without any."""
    return max((version for version, _ in find_links(directory)), default=None)


def write_manifest(directory: Path, link: ChainLink) -> None:
    """Into the link's directory, wherever that is for now. Not synced to disk."""
    content = {key: value for key, value in asdict(link).items() if key != "path"} | {"format": FORMAT}
    # One line a tensor would be nicer to look at, and ten times as slow to read.
    text = json.dumps({"checksum": _checksum(content), "content": content})
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def read_link(path: Path) -> ChainLink:
    """Read and check a manifest, and that the data has its size.

    Raises:
        UserError: the link is missing, damaged, or not where its name says that it belongs.
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
    """The error about a link that cannot be used."""
    return UserError(str(path), None, rule, "let the trainer write a full link, or copy the directory again")


def remove_older(directory: str | Path, oldest: int | None = None) -> list[Path]:
    """Remove links that nobody needs who wants version ``oldest`` or a later one, and what killed writers left behind.

    What is needed starts with the newest full link up to ``oldest``: everybody can go through it. Call it where the trainer
    writes, between two writes.

    Args:
        directory: of the links.
        oldest: by default the newest version.

    Returns:
        What was removed.
    """
    directory = Path(directory)
    links = find_links(directory)
    newest = max((version for version, _ in links), default=0)
    limit = newest if oldest is None else oldest
    first = max((version for version, kind in links if kind == "full" and version <= limit), default=0)
    # Of what leads to the full link's version, its own delta is for those who have the version before.
    unneeded = [links[key] for key in sorted(links) if key < (first, "full")]
    left_over = [path for path in directory.iterdir() if _LEFT_OVER.fullmatch(path.name)]
    return _remove(unneeded) + _remove(left_over)


def remove_newer(directory: str | Path, version: int) -> list[Path]:
    """Remove links of this version and later ones: a run that is resumed before them writes them anew.

    Returns:
        What was removed, newest first: whatever interrupts it, the rest is a chain.
    """
    links = find_links(Path(directory))
    return _remove(links[key] for key in sorted(links, reverse=True) if key[0] >= version)


def _remove(paths: Iterable[Path]) -> list[Path]:
    removed = []
    for path in paths:
        doomed = path
        if not path.name.startswith("."):
            # At once for whoever looks for links; those that have opened its files keep them.
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
