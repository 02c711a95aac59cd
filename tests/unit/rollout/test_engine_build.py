"""An engine by import path is refused before it starts, on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.rollout.build import build_engine
from tests.forked import run_ranks

TINY = Path(__file__).parents[2] / "tiny.yaml"
ENGINES = """
from megatron_rl.rollout.engine import InProcessEngine
class Half(InProcessEngine):
    def __init__(self, config, model, *, device, cpu_group): ...
    def update_weights(self, source, version): ...
def short(config, model): ...
def nothing(config, model, *, device, cpu_group): ...
NUMBER = int("3")
"""


def built(name: str) -> str:
    config = load_config(TINY, ["policy.model_path=m", f"rollout.engine=own_engines:{name}"])
    model: Any = None
    assert dist.group.WORLD is not None
    with pytest.raises(UserError) as caught:
        build_engine(config, model, device=torch.device("cpu"), cpu_group=dist.group.WORLD)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("Half", "is a class that lacks complete"),
        ("short", "cannot be called as f(config, model, device=..., cpu_group=...) (got an unexpected"),
        ("nothing", "built a NoneType, which is not an engine"),
        ("NUMBER", "is an int, not a function or a class"),
    ],
)
def test_what_is_no_engine_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rule: str) -> None:
    (tmp_path / "own_engines.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)
    for error in run_ranks(built, 2, name):
        assert error.startswith(f"rollout.engine = 'own_engines:{name}': {rule}")
