"""Paths in a config are resolved in one way, and refused before a module of the user's is run."""

from __future__ import annotations

import abc
from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_rl import plugins
from megatron_rl.errors import UserError

KNOWN = {"one": 1, "two": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def find(name: str) -> object:
    return plugins.find(name, KNOWN, field="data.thing", what="a thing")


def test_a_known_name_and_a_path_are_found(folder: Path) -> None:
    (folder / "plugins_good.py").write_text("THING = 3\n")
    assert find("two") == 2 and find("plugins_good:THING") == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "three",
            r"data.thing = 'three': is not a known thing; there are one, two. Fix: use one of them, or give a thing of",
        ),
        ("plugins_bad:", "does not read package.module:NAME"),
        ("plugins_bad.py:", r"does not read file.py:NAME. Fix: give plugins_bad.py:NAME, with the name of a thing in"),
        ("a-b:X", "does not read package.module:NAME"),
        ("plugins_nowhere:X", "there is no module plugins_nowhere"),
        ("plugins_nowhere.inside:X", "cannot be imported"),
        ("plugins_bad:THINK", r"plugins_bad has no THINK. Fix: did you mean THING\?$"),
        ("plugins_bad:inside", "has no inside"),
        ("plugins_bad:THING", r"cannot be imported \(ZeroDivisionError"),
        ("plugins_syntax:THING", r"cannot be imported \(SyntaxError in line 1"),
        ("plugins_folder:THING", "plugins_folder has no THING"),
    ],
)
def test_what_is_wrong_is_one_error(folder: Path, name: str, message: str) -> None:
    (folder / "plugins_bad.py").write_text("THING = 1 / 0\ndef f():\n    inside = 1\n")
    (folder / "plugins_syntax.py").write_text("THING = = 1\n")
    (folder / "plugins_folder").mkdir()
    with pytest.raises(UserError, match=message):
        find(name)


@pytest.mark.parametrize(
    "source",
    [
        "if True:\n    THING = print",
        "import os as THING",
        "from os import *",
        "class THING: ...",
        "match 'x':\n    case str() as THING: ...",
        "globals()['THING'] = 1",
        "def bind():\n    global THING\n    THING = 1\nbind()",
    ],
)
def test_a_check_knows_names_bound_in_any_way_and_runs_nothing(folder: Path, source: str) -> None:
    name = f"plugins_form_{abs(hash(source))}"
    (folder / f"{name}.py").write_text(source + "\nraise SystemExit('it ran')\n")
    plugins.check(f"{name}:THING", field="f", what="a thing")


def test_source_in_another_encoding(folder: Path) -> None:
    (folder / "plugins_latin.py").write_bytes("# -*- coding: latin-1 -*-\n# \xe9\nTHING = 4\n".encode("latin-1"))
    assert find("plugins_latin:THING") == 4


class Whole(abc.ABC):
    @abc.abstractmethod
    def part(self) -> None: ...


async def later(a: int, b: int) -> None: ...


@pytest.mark.parametrize(
    ("found", "rule"),
    [
        (3, r"is an int, not a function or a class. Fix: name what can be called as f\(a, b=...\)"),
        (later, "is an async function"),
        (Whole, "is a class that lacks part"),
        (lambda a: a, r"cannot be called as f\(a, b=...\) \(got an unexpected keyword argument 'b'\)"),
        (lambda a, b, c: a, r"cannot be called as f\(a, b=...\) \(missing a required argument: 'c'\)"),
        (lambda a, *, b, c=3: a, ""),
        (print, r"cannot be called as f\(a, b=...\)"),
        (dict, ""),  # says nothing of its arguments
    ],
)
def test_what_cannot_be_called_as_it_will_be_is_one_error(found: object, rule: str) -> None:
    expected = pytest.raises(UserError, match=r"data.thing = 'm:F': " + rule) if rule else nullcontext()
    with expected:
        plugins.check_call(found, "m:F", ("a",), ("b",), field="data.thing")


def test_another_text_of_a_file_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def score(response): return 1.0")
    before = plugins.file_digest(f"{file}:score")
    file.write_text("def score(response): return 0.0")
    assert None not in (before, now := plugins.file_digest(f"{file}:score")) and before != now
    assert plugins.file_digest(None) is None and plugins.file_digest("package.module:score") is None
