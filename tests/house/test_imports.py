"""Who may import whom (the rooms of the house), and that importing the package does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "megatron_rl"

# room -> rooms it may import. Everything may import errors and types.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "config": {"convert.shape", "tasks"},
    "convert": set(),
    "parallel": set(),
    "advantages": {"config"},
    "losses": {"config"},
    "rewards": {"tasks"},  # the pool looks a task up by name inside its workers
    "tasks": {"rewards"},
    "data": {"config", "convert", "metrics", "parallel", "rewards", "tasks"},
    "metrics": {"config"},
    "curves": {"metrics"},
    "summary": {"metrics"},
    "rollout": {
        "config", "convert.in_memory", "convert.shape", "lifetime", "parallel", "patches", "rewards", "data", "metrics",
        "watchdog",
    },
    "model": {"config", "convert", "data", "losses", "metrics", "parallel"},
    "weight_sync": {"config", "convert", "parallel", "model", "rollout"},
    "algorithms": {"advantages", "config", "data", "losses", "rewards", "rollout", "viewer"},
    "doctor": {"algorithms", "config", "convert", "model", "parallel", "patches", "rollout"},
    "launch": {"config", "lifetime", "watchdog"},
    "diversity": set(),
    "distance": {"config", "data", "losses", "model"},
    "evaluate": {"config", "diversity", "metrics", "rewards", "rollout"},
    "program": {"config", "runtime"},
    "inputs": {"algorithms", "config", "convert", "data", "distance", "parallel", "tasks"},
    "engines": {"config", "inputs", "parallel", "rollout", "runtime", "weight_sync"},
    "measure": {"rewards"},
    "viewer": {"advantages", "config"},
}  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron_rl."):
            found.add(node.module.removeprefix("megatron_rl."))
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    mine = room(path)
    if mine not in ALLOWED:
        return  # run, train, runtime, cli: they wire the rooms
    allowed = ALLOWED[mine] | {mine, "errors", "types"}
    wrong = {name for name in imports(path) if name.split(".")[0] not in allowed and name not in allowed}
    assert not wrong, f"{mine} must not import {wrong}"


def test_megatron_is_imported_by_few_rooms() -> None:
    users = {
        room(path)
        for path in ROOT.rglob("*.py")
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
