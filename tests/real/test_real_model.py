"""A pretrained model and its conversion: tokenizer, log-probs under layouts, import and export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.doctor.exactness import load_reference, naive_log_probs
from megatron_rl.types import TrainingSample
from tests.forked import run_ranks
from tests.parallel.invariance import config_of, num_ranks
from tests.policy_case import build_policy
from tests.real.conftest import END_ID, NUM_LONG, gsm8k, megatron_rl, worked

LAYOUTS = [{"tp": 1}, {"tp": 3}, {"pp": 2}, {"tp": 3, "pp": 2}]
BOUNDS = {"mean": 1e-6, "rms": 8e-6, "99 %": 3e-5, "max": 1.5e-4}
"""Errors against float64; transformers' own float32 has 2e-7, 4e-6, 2e-5, 4e-5. The largest is that of one token in 2,044, and
depends on the order of summation."""

IDS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "a\n\n1. b": [81, 1116, 33, 30, 278],
}
"""Ids of the published tokenizer."""


@pytest.mark.parametrize("text", IDS)
def test_tokenizer_is_the_published_one(tokenizer: Any, text: str) -> None:
    assert tokenizer.encode(text) == IDS[text] and tokenizer.decode(IDS[text]) == text


def test_turns_and_end_token(model: Path, tokenizer: Any) -> None:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert chat == (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    generation = json.loads((model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>") == END_ID
    assert generation["pad_token_id"] == tokenizer.pad_token_id == END_ID


@pytest.fixture(scope="module")
def solutions(model: Path, tokenizer: Any) -> tuple[list[TrainingSample], list[Tensor]]:
    """Rows, and the log-probs of their responses from transformers in float64."""
    rows = [worked(tokenizer, row) for row in gsm8k()[:NUM_LONG]]
    network = load_reference(model)
    with torch.no_grad():
        return rows, [naive_log_probs(network, row)[0] for row in rows]


def log_probs_of(model: Path, rows: list[TrainingSample], layout: dict) -> list[Tensor]:
    policy = build_policy(config_of(model, "policy.train_micro_batch_tokens=1024", **layout))
    fresh = [replace(row) for row in rows]
    policy.fill_log_probs(fresh, [range(len(fresh))], "old_log_probs")
    return [row.old_log_probs for row in fresh if row.old_log_probs is not None]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_log_probs_of_worked_solutions(
    model: Path, solutions: tuple[list[TrainingSample], list[Tensor]], layout: dict
) -> None:
    rows, true = solutions
    found = run_ranks(log_probs_of, num_ranks(layout), model, rows, layout, timeout_s=240)[0]
    off = torch.cat(found).double() - torch.cat(true)
    size = off.abs()
    errors = {
        "mean": off.mean().abs(), "rms": off.square().mean().sqrt(), "99 %": size.quantile(0.99), "max": size.max(),
    }  # fmt: skip
    print(f"{layout}, {len(off)} tokens:", {name: f"{float(error):.1e}" for name, error in errors.items()})
    assert len(off) > 2000 and all(errors[name] < bound for name, bound in BOUNDS.items())


def test_conversion_there_and_back(model: Path, tmp_path: Path) -> None:
    megatron_rl("convert", "import", str(model), str(tmp_path / "megatron"))
    megatron_rl("convert", "export", str(tmp_path / "megatron"), str(tmp_path / "hf"))
    source = load_file(model / "model.safetensors")
    written = {
        name: tensor for file in (tmp_path / "hf").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert source.keys() == written.keys() and len(source) == 272
    assert all(torch.equal(tensor, written[name]) for name, tensor in source.items())
