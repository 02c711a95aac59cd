"""Parts of examples/own_method by themselves; tests/e2e trains with them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_rl.config import load_config
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import ServedModel
from megatron_rl.tasks.word_tokenizer import ModelSize, save_model
from megatron_rl.types import Request, RowKind, TrainingSample

ROOT = Path(__file__).parents[3]
NAMES = ("engine", "method", "settings")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Modules of the example, found as a config finds them: at the top level of a folder on the path."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "own_method")
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        del sys.modules[name]


def build(own: dict[str, ModuleType], folder: Path, *, tied: bool) -> Any:
    save_model(folder, ModelSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, is_tied=tied))
    config = load_config(ROOT / "tests" / "tiny.yaml", [f"policy.model_path={folder}"])
    model = ServedModel(folder, read_shape(folder), torch.float32, (1,))
    return own["engine"].PlainEngine(config, model, device=torch.device("cpu"), cpu_group=None)


class Source:
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.tensors = weights.items


@pytest.mark.parametrize("tied", [False, True])
def test_an_engine_takes_all_weights_or_none(own: dict[str, ModuleType], tmp_path: Path, tied: bool) -> None:
    engine = build(own, tmp_path, tied=tied)
    weights = {name: torch.randn_like(held) for name, held in engine.network.named_parameters()}
    assert ("lm_head.weight" in weights) != tied
    engine.update_weights(Source(weights), 3)
    assert engine.weight_version == 3
    assert all(torch.equal(held, weights[name]) for name, held in engine.network.named_parameters())
    with pytest.raises(RuntimeError, match=r"nothing takes \['more'\]"):
        engine.update_weights(Source({**weights, "more": torch.zeros(1)}), 4)
    del weights["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"nothing came for \['model.norm.weight'\]"):
        engine.update_weights(Source(weights), 4)
    assert engine.weight_version == 3


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}])
def test_a_request_that_cuts_the_vocabulary_is_refused(
    own: dict[str, ModuleType], tmp_path: Path, cut: dict[str, Any]
) -> None:
    engine, whole = build(own, tmp_path, tied=True), Request(torch.tensor([5, 6]), 3, 1.0)
    assert len(engine.complete([whole])) == 1
    with pytest.raises(UserError, match="has no top_p and top_k"):
        engine.complete([whole, replace(whole, **cut)])


def test_credit_is_for_rows_with_a_policy_gradient(own: dict[str, ModuleType]) -> None:
    credit = own["method"].RunningMeanCredit(decay=0.5)
    kinds = (RowKind.RL, RowKind.REHEARSAL, RowKind.RL, RowKind.RL)
    rows = [TrainingSample(torch.tensor([1]), torch.tensor([2]), kind, reward=2.0) for kind in kinds]
    rows[1].reward, rows[3].has_reward = 8.0, False
    credit.assign(rows, [])
    assert [row.advantages for row in rows] == [torch.tensor([2.0]), None, torch.tensor([2.0]), torch.tensor([0.0])]
    assert float(credit.mean) == 1.0
    credit.assign(rows, [])
    assert rows[0].advantages == torch.tensor([1.0])
