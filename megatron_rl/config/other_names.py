"""Keys of other systems, translated: for the error of an unknown key, and for docs/coming_from/names.md.

The names are in the YAML file beside this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

SYSTEMS = {"verl": "verl", "slime": "slime", "nemo_rl": "NeMo-RL", "trl": "TRL"}
"""Keys of the YAML file -> names of the systems."""


@dataclass(frozen=True)
class Meaning:
    """One setting by all its names."""

    ours: str
    """Our key, or ``KEY=VALUE``; "" where there is nothing alike."""
    theirs: dict[str, list[str]]
    """System -> its names, if it has any."""
    note: str
    """The difference, or why there is nothing alike."""


@dataclass(frozen=True)
class Translation:
    """A key of another system that a config gives, and what to give instead."""

    key: str
    value: Any
    system: str
    meaning: Meaning
    is_exact: bool
    """False where only its last part is a name of theirs: then it may as well be a misspelt key of ours."""

    @property
    def rule(self) -> str:
        """Say whose key it is."""
        return f"is {self.system}'s name" if self.is_exact else "is not a known key"

    @property
    def fix(self) -> str:
        """Say what it is called here."""
        ours, note = self.meaning.ours, self.meaning.note
        if not ours:
            return f"leave it out: {note}"
        return f"here it is {ours}" + (f" ({note})" if note else "")


@cache
def meanings() -> list[Meaning]:
    """Read the names, in the order of the file."""
    text = files(__package__).joinpath("other_names.yaml").read_text(encoding="utf-8")
    found = []
    for row in yaml.safe_load(text):
        names = {system: row.get(key, []) for key, system in SYSTEMS.items()}
        theirs = {system: [given] if isinstance(given, str) else given for system, given in names.items()}
        found.append(Meaning(row.get("ours", ""), theirs, row.get("note", "")))
    return found


def translate(key: str, value: Any) -> Translation | None:
    """Find what a key that is not ours is called here.

    Args:
        key: dotted.
        value: given under it. In a section, the first key that another system knows is translated.
    """
    if isinstance(value, Mapping):
        inner = (translate(f"{key}.{name}", given) for name, given in value.items())
        return next((found for found in inner if found), None)
    name = key.replace("-", "_")
    by_name = {theirs: (system, one) for one in meanings() for system in one.theirs for theirs in one.theirs[system]}
    # slime's and TRL's names have no dots. They come at the top, or in the section where they seem to belong.
    for candidate in (name, name.rpartition(".")[2]):
        if candidate in by_name:
            return Translation(key, value, *by_name[candidate], is_exact=candidate == name)
    return None


def table() -> str:
    """Return all names as a Markdown table, ours first."""
    rows = [["ours", *SYSTEMS.values(), "note"], ["---"] * (len(SYSTEMS) + 2)]
    for one in meanings():
        theirs = [", ".join(f"`{name}`" for name in one.theirs[system]) for system in SYSTEMS.values()]
        rows.append([f"`{one.ours}`" if one.ours else "", *theirs, one.note])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
