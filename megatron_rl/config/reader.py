"""YAML files with ``defaults:`` and dotted overrides, merged into one tree of plain values; interpolations stay as written."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rl.errors import UserError
from megatron_rl.plugins import kind_of

Tree = dict[str, Any]

NOT_YAML = (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError)
"""Errors of reading a text that is not YAML, or whose keys and interpolations OmegaConf does not know."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
ODD_NUMBER = re.compile(r"[-+]?(\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?|0[0-7_]+)")
"""Numbers of YAML 1.1 that mean something else than they look like: 1:30 is 90, and 010 is 8."""


SETS = "data.validation"
"""The key whose mapping is a value, not a section: another value may take its place."""


def read_tree(path: str | Path, overrides: Sequence[str]) -> Tree:
    """Read a config file, what it inherits from, and the overrides.

    Raises:
        UserError: for the first thing that is wrong.
    """
    tree = _read(Path(path), seen=())
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")) or key != key.strip():
            raise UserError(
                "override", key + equals, "must read section.field=value", "for example trainer.max_steps=100"
            )
        if key.startswith("+"):
            raise UserError("override", key + equals, "begins with Hydra's +", f"leave it out: {key.lstrip('+')}=VALUE")
        value: Any = _read_value(key, text)
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    return tree


def quoted(text: str) -> str:
    """Quote a text for an override, in YAML's syntax, where ``2024`` would be a number."""
    return "'" + text.replace("'", "''") + "'"


def _read(path: Path, seen: tuple[Path, ...]) -> Tree:
    path = path.resolve()
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise UserError(
            "defaults", path.name, f"files inherit from each other in a circle: {chain}", "break the circle"
        )
    tree = _read_file(path)
    parents = tree.pop("defaults", None)
    if isinstance(parents, str):
        parents = [parents]
    is_list = isinstance(parents, list | None)
    if not is_list or not all(isinstance(parent, str) and parent.isprintable() for parent in parents or []):
        raise UserError("defaults", parents, "must be the path of a YAML file, or a list of such", f"correct {path}")
    merged: Tree = {}
    for parent in parents or []:
        merged = _merge(merged, _read(path.parent / os.path.expanduser(parent), (*seen, path)))
    return _merge(merged, tree)


def _read_file(path: Path) -> Tree:
    fix = "start from a file in configs/"
    try:
        text = path.read_bytes().decode("utf-8-sig")
        loaded = _load(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError("config", str(path), f"cannot be read ({reason})", "give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 (byte {error.start}: {error.reason})"
        raise UserError("config", str(path), rule, "save the file as UTF-8") from None
    except NOT_YAML as error:
        raise UserError("config", str(path), f"is not valid YAML ({_reason(error)})", "correct the file") from None
    if loaded is None:
        raise UserError("config", str(path), "is empty", fix)
    if not isinstance(loaded, dict):
        raise UserError("config", str(path), "must be a mapping of sections", fix)
    _check_keys(loaded)
    return loaded


def _read_value(key: str, text: str) -> Any:
    """Read the value of an override."""
    try:
        value = _load(text)
    except NOT_YAML as error:
        fix = f"put a text that is not YAML into quotes of its own, as in {key}='\"a: b\"'"
        raise UserError(key, text, f"is not a valid YAML value ({_reason(error)})", fix) from None
    _check_keys(value, key)
    return value


def _load(text: str) -> Any:
    """Read one YAML document.

    Raises:
        NOT_YAML: it is none, or has a number that does not mean what it looks like.
    """
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and ODD_NUMBER.fullmatch(event.value):
            problem = f"{event.value} would not be the number that it looks like: write a decimal one, or quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
    loaded = OmegaConf.from_dotlist([f"value={text}"])
    tree = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(tree, dict)
    return tree["value"]


def _check_keys(value: Any, *where: str) -> None:
    """Check that all keys are texts: YAML reads ``1: x`` and ``on: x`` otherwise."""
    if isinstance(value, list):
        for item in value:
            _check_keys(item, *where)
    if isinstance(value, dict):
        for key, inner in value.items():
            field = ".".join((*where, str(key)))
            if not isinstance(key, str):
                raise UserError(
                    field, None, f"is a key that YAML reads as {kind_of(key)}, not as a text", "put it into quotes"
                )
            _check_keys(inner, field)


def _merge(below: Tree, above: Tree, where: tuple[str, ...] = ()) -> Tree:
    """Return ``below`` with what ``above`` gives; lists are replaced whole.

    Raises:
        UserError: a value stands where ``below`` has a section, or a section where it has an interpolation: settings would be
            lost.
    """
    merged = dict(below)
    for key, value in above.items():
        known = below.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merged[key] = _merge(known, value, (*where, key))
        elif known and isinstance(known, dict) and not (isinstance(value, str) and "${" in value):
            field = ".".join((*where, key))
            if field == SETS:
                merged[key] = value
                continue
            raise UserError(field, value, "is a section, not a value", f"give its fields, as {field}.FIELD=VALUE")
        elif isinstance(known, str) and "${" in known and isinstance(value, dict):
            field = ".".join((*where, key))
            rule = "is an interpolation, which would be lost with all that it stands for"
            fix = "change the section that it refers to, or write this one out where the interpolation stands"
            raise UserError(field, known, rule, fix)
        elif value != "???" or key not in below:  # which says that only the user knows
            merged[key] = value
    return merged


def _reason(error: Exception) -> str:
    """Say what is wrong with a YAML text, and where if that is known, without the excerpts that parsers add."""
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + (getattr(error, "problem", None) or next(iter(str(error).splitlines()), type(error).__name__))
