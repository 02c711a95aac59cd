"""The figure of the floors in docs/structure.md agrees with the list of imports; no two test files have one name."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from test_imports import ALLOWED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "structure.md").read_text()
FLOORS = {
    name.removesuffix(".py").rstrip("/").replace("/", "."): int(floor)
    for floor, names in re.findall(r"^(\d)   (.+)$", PAGE, re.MULTILINE)
    for name in names.split()
}
"""Room -> floor."""


def test_every_room_is_in_the_figure() -> None:
    assert not set(ALLOWED) - {"convert"} - set(FLOORS)


def test_every_room_stands_above_those_that_it_imports() -> None:
    wrong = [
        (room, below)
        for room, names in ALLOWED.items()
        for below in names
        if room in FLOORS and FLOORS[room] <= FLOORS[below]
    ]
    assert not wrong


def test_every_room_of_the_figure_is_in_the_table() -> None:
    table = {name.replace("/", ".").strip(".") for name in re.findall(r"`([a-z_./]+)`", PAGE)}
    names = {name.removesuffix(".py") for name in table}
    assert not set(FLOORS) - names


def test_test_files_have_names_of_their_own() -> None:
    """Pytest imports a test file by its name alone, so two of one name stop the whole collection."""
    counts = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []
