"""Methods by import path: found, checked and refused before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config import GroupConfig, load_config
from megatron_rl.config.methods import METHODS
from megatron_rl.errors import UserError

TINY = Path(__file__).parents[2] / "tiny.yaml"
SETTINGS = """
from typing import ClassVar
from megatron_rl.config import ClippedConfig, GroupConfig, MethodConfig, section

@section
class Mine(GroupConfig):
    implementation: ClassVar[str] = "{implementation}"
    strength: float = 0.5

@section
class Silent(GroupConfig):
    pass

class Other: ...

@section
class Countless(ClippedConfig):
    implementation: ClassVar[str] = "{implementation}"

@section
class Loose(MethodConfig):
    implementation: ClassVar[str] = "{implementation}"

class Bare(GroupConfig):
    implementation = "{implementation}"
    strength: float = 0.5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    for name, path in {
        "lab": "lab_method:Method",
        "lab_lost": "lab_method:Methud",
        "lab_none": "nowhere:Method",
    }.items():
        (tmp_path / f"{name}.py").write_text(SETTINGS.format(implementation=path))
    (tmp_path / "lab_method.py").write_text("import torch\nclass Method: ...\n")
    return tmp_path


def load(name: str, *overrides: str) -> GroupConfig:
    settings = load_config(TINY, ["policy.model_path=m", f"algorithm.name={name}", *overrides]).algorithm
    assert isinstance(settings, GroupConfig)
    return settings


def test_settings_come_from_outside_and_are_saved_under_their_path(folder: Path) -> None:
    settings = load("lab:Mine", "algorithm.strength=0.25", "algorithm.ratio_clip_max=0.3")
    assert (settings.name, settings.strength, settings.ratio_clip_max) == ("lab:Mine", 0.25, 0.3)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "lab:Mine",
            ("algorithm.strenght=1",),
            r"algorithm.strenght = 1: is not a known key. Fix: did you mean strength",
        ),
        ("lab:Mine", ("algorithm.strength=much",), r"algorithm.strength = 'much'"),
        ("lab:Mime", (), r"algorithm.name = 'lab:Mime': is not there: lab has no Mime. Fix: did you mean Mine\?"),
        ("lab:Other", (), "names no settings of a method"),
        ("lab:Silent", (), "does not say which class implements the method"),
        ("lab_lost:Mine", (), "lab_method has no Methud"),
        ("lab_none:Mine", (), "there is no module nowhere"),
        ("lab:Countless", (), "does not say how many rows a step has"),
        ("lab:Loose", (), "has no settings of rollouts and updates"),
        ("lab:Bare", (), "is a class whose fields nobody checks or saves"),
        ("grpo", ("algorithm.mask_threshold=0.9",), r"Fix: it is algorithm.selection.max_probability now"),
        ("gpro", (), r"is not a known method; there are dph_rl, grpo, .* Fix: did you mean grpo\?"),
        ("null", (), "is not a known method"),
    ],
)
def test_what_is_wrong_is_one_error(folder: Path, name: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name, *overrides)


def test_an_implementation_is_not_imported(folder: Path) -> None:
    code = (
        "import sys; from megatron_rl.config import load_config\n"
        f"load_config({str(TINY)!r}, ['policy.model_path=m', 'algorithm.name=lab:Mine'])\n"
        "print('torch' in sys.modules, 'lab_method' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_an_implementation_that_is_none_is_refused(folder: Path) -> None:
    from megatron_rl.algorithms import build_algorithm

    config = load_config(TINY, ["policy.model_path=m", "algorithm.name=lab:Mine"])
    with pytest.raises(UserError, match="is implemented by lab_method:Method, which is no Algorithm"):
        build_algorithm(config)


def test_every_method_says_what_the_rest_must_know(folder: Path) -> None:
    for name, settings in METHODS.items():
        assert settings.__dataclass_fields__["name"].default == name
        assert settings.implementation.startswith("megatron_rl.algorithms.")
        assert settings.stage in ("rl", "sft")
