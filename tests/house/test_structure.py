"""The figure of the floors in docs/structure.md agrees with the list of imports."""

from __future__ import annotations

import re
from pathlib import Path

from test_imports import ALLOWED

PAGE = (Path(__file__).parents[2] / "docs" / "structure.md").read_text()
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
