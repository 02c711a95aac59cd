"""Models of the Hugging Face hub by name: ``ORGANISATION/NAME`` or ``ORGANISATION/NAME@REVISION``, instead of a folder.

A name stays a name in configs and checkpoints; ``local_folder`` turns it into the folder of the hub's cache with its files.
Commands fetch these files before ranks start, the small ones first; a rank only looks into the cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.convert.architecture.weight_files import find_weight_files, needed_files
from megatron_rl.errors import UserError, described

CONFIG = ("config.json",)
_SMALL = (".json", ".jinja", ".txt", ".model")
"""Endings of files beside the weights: config, tokenizer, chat template, generation config, index of the weights."""
_HUB_NAME = re.compile(r"(?P<model>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class HubName:
    """A model of the hub."""

    model: str
    """``ORGANISATION/NAME``."""
    revision: str
    """A branch, a tag or a commit."""


def hub_name(text: str) -> HubName | None:
    """Take a name apart; None of a folder or file that exists, and of what cannot be a name."""
    match = None if Path(text).exists() else _HUB_NAME.fullmatch(text)
    return None if match is None else HubName(match["model"], match["revision"] or "main")


def local_folder(text: str, *, field: str) -> Path:
    """Return the folder that a model's path or name stands for. A path comes back as it is, whether it exists or not.

    Args:
        text: a folder, or a name of the hub.
        field: config key, for errors.

    Raises:
        UserError: it can only be a name of the hub, and the cache has nothing of it.
    """
    name = hub_name(text)
    if name is None:
        return Path(text)
    snapshot = _snapshot(name)
    if snapshot is None:
        raise _absent(text, name, field, "is no folder here, and no model in the cache of the Hugging Face hub")
    return snapshot


def fetch_small_files(text: str, *, field: str, only: tuple[str, ...] | None = None) -> None:
    """Bring config, tokenizer and what else is small into the cache; nothing to do for a folder.

    Args:
        text: a folder, or a name of the hub.
        field: config key, for errors.
        only: the files; None: all but the weights.

    Raises:
        UserError: this user may not have it, there is no such model, or neither hub nor cache can give it.
    """
    if (name := hub_name(text)) is None:
        return
    there = _files_on_hub(text, name, field, is_cached=_snapshot(name) is not None)
    if there is not None:
        small = {file for file in there if "/" not in file and file.endswith(_SMALL)}
        _download(text, name, field, sorted(small if only is None else small & set(only)))


def fetch_weights(text: str, *, field: str) -> None:
    """Bring the weights into the cache: safetensors, or ``.bin`` files of a model that has no others.

    Args:
        text: a folder, or a name of the hub; ``fetch_small_files`` has run.
        field: config key, for errors.

    Raises:
        UserError: as there.
    """
    if (name := hub_name(text)) is None:
        return
    there = _files_on_hub(text, name, field, is_cached=_has_weights(name))
    if there is not None:
        _download(text, name, field, list(needed_files(local_folder(text, field=field), there)))


def _snapshot(name: HubName) -> Path | None:
    """Return the folder of a revision in the cache."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.model.replace('/', '--')}"
    try:
        commit = (folder / "refs" / name.revision).read_text().strip()
    except OSError:
        commit = name.revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _has_weights(name: HubName) -> bool:
    snapshot = _snapshot(name)
    try:
        return snapshot is not None and bool(find_weight_files(snapshot).files)
    except UserError:
        return False


def _files_on_hub(text: str, name: HubName, field: str, *, is_cached: bool) -> list[str] | None:
    """Return the names of a model's files; None where the hub is out of reach and the cache has what is wanted."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(name.model, revision=name.revision, timeout=_TIMEOUT_S)
    except Exception as error:  # of huggingface_hub, of its HTTP client, of the system
        if (refusal := _refusal(text, name, field, error)) is not None:
            raise refusal from error
        if is_cached:
            return None
        raise _unreached(text, name, field, error) from error
    return [file.rfilename for file in found.siblings or []]


def _download(text: str, name: HubName, field: str, files: list[str]) -> None:
    from huggingface_hub import snapshot_download

    if not files:
        return
    try:
        snapshot_download(name.model, revision=name.revision, allow_patterns=files)
    except Exception as error:
        raise (_refusal(text, name, field, error) or _unreached(text, name, field, error)) from error


def _refusal(text: str, name: HubName, field: str, error: Exception) -> UserError | None:
    """Return the error for an answer of the hub; None where there was no answer."""
    from huggingface_hub import errors

    kinds: list[tuple[Any, str, str]] = [
        (
            errors.GatedRepoError,
            "is a gated model, which the hub does not give to this user",
            f"accept its terms at https://huggingface.co/{name.model}, then hf auth login, or set HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError,
            "is no folder here, and the hub shows this user no such model",
            "correct the path or the name; for a private model hf auth login, or set HF_TOKEN",
        ),
        (
            errors.RevisionNotFoundError,
            f"has no revision {name.revision} on the hub",
            "name a branch, a tag or a commit",
        ),
    ]
    for kind, rule, fix in kinds:
        if isinstance(error, kind):
            return UserError(field, text, rule, fix)
    return None


def _unreached(text: str, name: HubName, field: str, error: Exception) -> UserError:
    where = "is no folder here, is not whole in the cache of the Hugging Face hub"
    rule = f"{where}, and the hub was not reached ({described(error)})"
    return _absent(text, name, field, rule)


def _absent(text: str, name: HubName, field: str, rule: str) -> UserError:
    revision = "" if name.revision == "main" else f" --revision {name.revision}"
    return UserError(
        field,
        text,
        rule,
        f"correct the path; or with a network: hf download {name.model}{revision} --local-dir FOLDER, and {field}=FOLDER; "
        "HF_HOME says where the cache is",
    )
