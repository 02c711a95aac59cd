"""Folders that a program fills chunk by chunk: begun with settings that another start must have, and resumed after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.files import SAME_COMMAND, disk_errors, write_atomic
from megatron_rl.types import Prompt


def has_begun(directory: Path, settings: Mapping[str, Any], *, field: str, fix: str) -> bool:
    """Tell whether a folder was begun with these settings, which ``begin`` writes.

    Args:
        directory: the folder, which need not be there.
        settings: what its content depends on, as JSON.
        field: what an error names.
        fix: what to do if they differ.

    Raises:
        UserError: it was begun with others.
    """
    path = directory / "settings.json"
    if not path.is_file():
        return False
    found = read_json(path)
    if found != json.loads(json.dumps(settings)):
        changed = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
        raise UserError(field, str(directory), f"was begun with other settings: {', '.join(changed)}", fix)
    return True


def begin(directory: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a folder."""
    write_json(directory / "settings.json", settings)


def count_chunks(chunk: Callable[[int], Path]) -> int:
    """Return how many chunks are done, from 0 on without a gap, by the files that say so."""
    done = 0
    while chunk(done).is_file():
        done += 1
    return done


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return a digest of problems, their token ids and their reference answers, by which samples were judged."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(prompt.problem.problem_id.encode())
        digest.update(prompt.prompt_ids.numpy().tobytes())
        digest.update(json.dumps(prompt.problem.answer).encode())
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read a file of ours.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), None, f"cannot be read ({error})", "remove the folder and sample again") from error


def write_json(path: Path, value: Any) -> None:
    """Write a file atomically.

    Raises:
        UserError: it cannot be written.
    """
    with disk_errors(path, fix=SAME_COMMAND):
        write_atomic(path, json.dumps(value, indent=1) + "\n")
