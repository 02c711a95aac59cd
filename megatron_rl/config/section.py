"""Config sections, and the kinds of values that their fields share.

Each section is a frozen, keyword-only dataclass that refuses unknown keys, NaN and infinity. A kind of value refuses what
cannot work wherever it stands: a port beyond 65535, a time limit that no timer takes, a path with a line break.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, TypeVar, cast, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

T = TypeVar("T")
MAX_SECONDS = 2_000_000
"""Limit of a time limit, 23 days: its milliseconds fit into 32 bits, as sockets and stores count them."""
MAX_PER_MACHINE = 1024
MAX_PORT = 65535
MAX_NAME_BYTES = 200
"""Length of a folder's name. File systems take 255 bytes, and a run adds to some names."""
SET_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, line breaks among them, and halves of surrogate pairs."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """Make a checked section of a class with annotated fields."""
    # NaN passes every bound that is checked by comparison, and an infinite rate or limit says nothing anyone means.
    checks = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    make = dataclass(frozen=True, kw_only=True, config=checks)
    return cast("type[T]", make(cls))


def refusal(rule: str, fix: str) -> PydanticCustomError:
    """Return the error by which a kind of value says its rule and its fix; load.py adds field and value."""
    return PydanticCustomError("kind", "{rule}", {"rule": rule, "fix": fix})


def _checked_path(path: str) -> str:
    """Return a path with ``~`` spelt out; shells leave it where it stands behind a ``=``."""
    if not path.strip():
        raise refusal("is empty", "give a path, or leave it out")
    if UNPRINTABLE.search(path):
        raise refusal("has a character that does not belong into a path", "remove it")
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise refusal("begins with the name of a user who has no home here", "give the full path, or ./~NAME")
    if len(os.fsencode(full)) > 4000 or any(len(part) > 255 for part in os.fsencode(full).split(b"/")):
        raise refusal("is longer than a file system takes", "shorten it")
    return full


def _checked_paths(paths: object) -> list[str]:
    """Return one path or several as a list."""
    given = [paths] if isinstance(paths, str) else list(paths) if isinstance(paths, list | tuple) else []
    if not given or not all(isinstance(path, str) for path in given):
        raise refusal(
            "must be a path, or a list of paths", "give one, as in data.train=problems.parquet, or [a.jsonl, b.jsonl]"
        )
    return [_checked_path(path) for path in given]


RESERVED = ("dropped", "style")
"""First parts of metrics below ``eval/``, which no held-out set can be called."""


def _checked_sets(sets: object) -> list[str] | dict[str, list[str]]:
    """Return the paths of one set as a list, or those of several by name."""
    if not isinstance(sets, dict):
        return _checked_paths(sets)
    if not sets:
        raise refusal("names no set", "give one, as in {gsm8k: gsm8k.jsonl}, or leave it out")
    for name in sets:
        if not isinstance(name, str) or not SET_NAME.fullmatch(name) or name in RESERVED:
            rule = f"has a set called {name!r}: a name is of letters, digits and . _ -, and not {' or '.join(RESERVED)}"
            raise refusal(rule, "call it by one word, as in {gsm8k: gsm8k.jsonl}")
    try:
        return {name: _checked_paths(paths) for name, paths in sets.items()}
    except PydanticCustomError:
        for name, paths in sets.items():
            if not isinstance(paths, str | list | tuple) or not paths:
                rule = f"has under {name!r} neither a path nor a list of paths"
                raise refusal(
                    rule, "give files by name, as in {gsm8k: gsm8k.jsonl, aime: [a.jsonl, b.jsonl]}"
                ) from None
        raise


def _checked_name(name: str) -> str:
    """Return the name of one folder, which lies in the folder above and nowhere else."""
    if not name.strip() or name in (".", "..") or "/" in name or os.sep in name or UNPRINTABLE.search(name):
        raise refusal(
            "must be the name of one folder, without a separator", "choose a word; exp_dir says where it lies"
        )
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise refusal(f"is longer than {MAX_NAME_BYTES} bytes", "shorten it")
    return name


def _checked_temperature(temperature: float) -> float:
    """Return a temperature at which sampling and log-probs mean something: below, engines decode greedily."""
    if not 0.001 <= temperature <= 1000:
        raise refusal("must lie between 0.001 and 1000", "use 1.0; greedy decoding belongs to eval.greedy")
    return temperature


IS_PATH = AfterValidator(_checked_path)
PathText = Annotated[str, IS_PATH]
"""A path; ``~`` is the user's home."""
ARE_PATHS = BeforeValidator(_checked_paths)
PathTexts = Annotated[list[str], ARE_PATHS]
"""Paths; one may be given as a text."""
ARE_SETS = BeforeValidator(_checked_sets)
PathSets = Annotated[list[str] | dict[str, list[str]], ARE_SETS]
"""Paths of one set, or a mapping: the name of a set -> its paths."""
FolderName = Annotated[str, AfterValidator(_checked_name)]
Temperature = Annotated[float, AfterValidator(_checked_temperature)]
Seconds = Annotated[float, Field(ge=0.001, le=MAX_SECONDS)]
"""A time limit or an interval."""
Port = Annotated[int, Field(ge=1, le=MAX_PORT)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""A seed that Python, numpy and torch take alike."""
PerMachine = Annotated[int, Field(ge=1, le=MAX_PER_MACHINE)]
"""A number of processes on one machine."""
