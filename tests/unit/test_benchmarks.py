"""``make bench`` starts every benchmark without arguments."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def required_arguments(source: str) -> list[str]:
    """Arguments of ``add_argument`` calls without which a script does not start."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = []
    for call in (call for call in calls if getattr(call.func, "attr", "") == "add_argument"):
        (name, *_), options = map(ast.literal_eval, call.args), {word.arg: word.value for word in call.keywords}
        is_optional = "nargs" in options if not name.startswith("-") else "required" not in options
        found += [] if is_optional else [name]
    return found


def test_what_is_required() -> None:
    assert required_arguments("p.add_argument('a')\np.add_argument('b', nargs='?')\np.add_argument('--c')") == ["a"]
    assert required_arguments("p.add_argument('--d', required=True)") == ["--d"]


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_starts_without_arguments(script: Path) -> None:
    assert not required_arguments(script.read_text())


def test_without_a_second_checkout_there_is_nothing_to_compare() -> None:
    done = subprocess.run([sys.executable, FOLDER / "first_steps.py"], check=True, capture_output=True, text=True)
    (line,) = done.stdout.splitlines()
    assert "first_steps.py BEFORE" in json.loads(line)["skipped"]
