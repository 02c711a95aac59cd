"""Every patch says why it is there, what it changes, for which versions, until when, and where it is tested."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIELDS = ["Why", "Upstream", "Versions", "Remove when", "Tested by"]
HELPERS = {"__init__.py", "upstream.py"}
PATCHES = sorted(path for path in (ROOT / "patches").glob("*/*.py") if path.name not in HELPERS)


def header(path: Path) -> dict[str, str]:
    """Fields of the docstring, in order: ``Name: text`` at the margin, continued on indented lines."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return dict(re.findall(r"^([A-Z][a-z]+(?: [a-z]+)?): (.+(?:\n +.+)*)", docstring, re.MULTILINE))


def test_patches_are_found() -> None:
    assert len(PATCHES) >= 8


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_header_has_all_fields(path: Path) -> None:
    assert [field for field in header(path) if field in FIELDS] == FIELDS


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_versions_are_a_range(path: Path) -> None:
    assert re.match(r"\d+\.\d+\.\d+ - \d+\.\d+\.\d+", header(path)["Versions"])


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_named_test_exists(path: Path) -> None:
    assert (ROOT / header(path)["Tested by"]).is_file()


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_patch_is_applied(path: Path) -> None:
    from megatron_rl import patches
    from megatron_rl.patches import pytorch, sglang

    # Each in its own process in real life: the trainer's, and the server's.
    applied = {
        "megatron_core": lambda: patches.apply(),
        "sglang": lambda: [f"sglang.{topic}" for topic in sglang.apply_cpu()],
        "pytorch": lambda: [f"pytorch.{topic}" for topic in pytorch.apply()],
    }
    assert f"{path.parent.name}.{path.stem}" in applied[path.parent.name]()
