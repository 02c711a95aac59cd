"""Who may import whom (the rooms of the house), and that importing the package does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "megatron_rl"

# room -> rooms it may import. Everything may import errors, files and types.
ALLOWED: dict[str, set[str]] = {
    "convert": set(),
    "convert.architecture": set(),
    "errors": set(),
    "files": set(),
    "parallel": set(),
    "patches": set(),
    "plugins": set(),
    "process": set(),
    "rewards": set(),
    "tasks.rows": set(),
    "types": set(),
    "convert.tables": {"convert.architecture"},
    "tasks": {"plugins", "rewards", "tasks.rows"},
    "config": {"convert.architecture", "plugins", "tasks", "tasks.rows"},
    "convert.hf": {"convert.architecture", "convert.tables"},
    "scoring": {"parallel", "plugins", "tasks"},
    "advantages": {"config"},
    "convert.offline": {"convert.architecture", "convert.hf", "convert.tables", "process"},
    "losses": {"config"},
    "metrics": {"config", "plugins", "rewards"},
    "data": {
        "config", "convert.architecture", "convert.hf", "convert.tables", "parallel", "rewards", "tasks", "tasks.rows",
    },
    "launch": {"config", "metrics", "parallel", "patches", "plugins", "process", "tasks.rows"},
    "report": {"advantages", "config", "metrics", "rewards"},
    "rollout": {
        "config", "convert.architecture", "convert.hf", "metrics", "parallel", "patches", "plugins", "process", "scoring",
    },
    "algorithms": {"advantages", "config", "data", "losses", "metrics", "plugins", "report", "rollout"},
    "model": {
        "config", "convert.architecture", "convert.hf", "convert.offline", "convert.tables", "data", "losses", "metrics",
        "parallel", "patches", "process", "tasks.rows",
    },
    "evaluation": {"config", "data", "losses", "metrics", "model", "parallel", "rewards", "rollout", "tasks.rows"},
    "weight_sync": {
        "config", "convert.architecture", "convert.hf", "convert.tables", "model", "parallel", "plugins", "process",
        "rollout",
    },
    "doctor": {
        "algorithms", "config", "convert.architecture", "convert.hf", "convert.tables", "model", "parallel", "patches",
        "weight_sync",
    },
    "run": {
        "algorithms", "config", "convert.hf", "data", "doctor", "evaluation", "launch", "metrics", "model",
        "parallel", "process", "report", "rollout", "scoring", "weight_sync",
    },
    "commands": {
        "algorithms", "config", "convert.architecture", "convert.offline", "convert.tables", "data", "doctor", "evaluation",
        "launch", "metrics", "parallel", "plugins", "process", "report", "rewards", "rollout", "run", "scoring", "tasks",
    },
    "train": {"config", "launch", "process", "run"},
}  # fmt: skip


def module_name(path: Path) -> str:
    """Dotted, below the package: ``convert.tables.kinds``; a folder's ``__init__`` has the folder's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(name: str) -> str:
    """The entry of ``ALLOWED`` that a module belongs to: the longest that begins its name."""
    return max((entry for entry in ALLOWED if is_in(name, entry)), key=len)


def is_in(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def imports(source: str) -> set[str]:
    """Return a module's imports of the package, below ``megatron_rl``; ``from a import b`` is ``a.b`` if that is a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {as_module(name) for name in names if name.startswith("megatron_rl.")}
    return found - {""}


def as_module(name: str) -> str:
    """The module that a dotted name is, or is in."""
    parts = name.split(".")[1:]
    while parts and not ((folder := ROOT.joinpath(*parts)).is_dir() or folder.with_suffix(".py").is_file()):
        parts.pop()
    if name.startswith("megatron_rl.patches"):  # stands at the top of the repository
        return "patches"
    return ".".join(parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def test_every_entry_is_listed() -> None:
    entries = {name.split(".")[0] for name in MODULES if name}
    assert entries == {entry.split(".")[0] for entry in ALLOWED} - {"patches"}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_point_downward(name: str) -> None:
    allowed = ALLOWED[room(name)] | {room(name), "errors", "files", "types"}
    wrong = {found for found in imports(MODULES[name].read_text()) if not any(is_in(found, entry) for entry in allowed)}
    assert not wrong, f"{room(name)} must not import {wrong}"


def test_rooms_stand_on_each_other_without_a_circle() -> None:
    below = {entry: {room(name) for name in names} - {entry} for entry, names in ALLOWED.items()}
    standing: set[str] = set()
    while free := {entry for entry, names in below.items() if entry not in standing and names <= standing}:
        standing |= free
    assert standing == set(ALLOWED), f"in a circle: {set(ALLOWED) - standing}"


def test_no_module_imports_in_a_circle() -> None:
    """Also for annotations only, and inside a room."""
    imported = {name: imports(path.read_text()) - {name} for name, path in MODULES.items()}
    standing: set[str] = {"patches"}
    while free := {name for name, found in imported.items() if name not in standing and found <= standing}:
        standing |= free
    assert not set(MODULES) - standing, sorted(set(MODULES) - standing)


@pytest.mark.parametrize(
    "line",
    [
        "from megatron_rl import train",
        "import megatron_rl.train",
        "from megatron_rl.train import main",
        "def f():\n    from megatron_rl import train as t",
    ],
)
def test_an_import_is_seen_in_each_of_its_forms(line: str) -> None:
    assert imports(line) == {"train"}


def test_megatron_is_imported_by_few_rooms() -> None:
    users = {
        room(name)
        for name, path in MODULES.items()
        if "from megatron.core" in path.read_text() or "import megatron.core" in path.read_text()
    }
    assert users == {"model", "parallel"}


def test_importing_the_package_has_no_effect() -> None:
    code = "import sys; before = set(sys.modules); import megatron_rl; print(sorted(set(sys.modules) - before))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "['megatron_rl']"


def test_the_training_loop_stays_on_one_screen() -> None:
    tree = ast.parse((ROOT / "train.py").read_text())
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run_online")
    assert loop.end_lineno - loop.lineno < 40
