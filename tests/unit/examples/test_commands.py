"""The commands that the examples give: their configs load, with the overrides that stand there."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples import parts
from examples.parts import Part
from megatron_rl.commands.presample import adapt
from megatron_rl.config import load_config

ROOT = Path(__file__).parents[3]
EXAMPLES = {"five_styles": 12, "replay": 4, "segments": 4, "real_model": 2, "quickstart": 2}
"""Example -> least number of commands with a config."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_config_of_an_example_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    example = importlib.import_module(f"examples.{name}.run")
    commands: list[Sequence[str]] = []

    def note(part: Part) -> float:
        commands.append(part.command)
        return 0.0

    for module in (parts, example):
        monkeypatch.setattr(module, "seconds_of", note, raising=False)
    monkeypatch.setattr(example, "rows_of", lambda _run: [{}], raising=False)
    monkeypatch.setattr(example, "write_report", lambda *_report: None, raising=False)
    monkeypatch.setattr("sys.argv", ["run"])
    with contextlib.suppress(Exception):  # without the runs there is nothing to report
        example.main()
    loaded = [_load(command) for command in commands if "megatron_rl.commands" in command]
    assert len(loaded) >= EXAMPLES[name]


def _load(command: Sequence[str]) -> Any:
    verb, config, *overrides = command[command.index("megatron_rl.commands") + 1 :]
    checked = load_config(config, overrides)
    return adapt(checked) if verb == "presample" else checked
