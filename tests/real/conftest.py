"""SmolLM2-135M-Instruct, and 32 rows of GSM8K (gsm8k.LICENSE). `make test-real` makes the model's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.types import RowKind, TrainingSample

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "build" / "smollm2"
GSM8K = Path(__file__).with_name("gsm8k.jsonl")
NUM_LONG = 8
"""Rows at the beginning of gsm8k.jsonl, which have the longest solutions."""
END_ID = 2
"""<|im_end|>, in this model's tokenizer."""


@pytest.fixture(scope="session")
def model() -> Path:
    if not (MODEL / "config.json").exists():
        pytest.skip("no build/smollm2: make test-real")
    return MODEL


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def gsm8k() -> list[dict[str, str]]:
    return [json.loads(line) for line in GSM8K.read_text().splitlines()]


def chat_ids(tokenizer: Any, question: str) -> torch.Tensor:
    """[P] int64: a user's turn, and the beginning of the assistant's."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor(tokenizer.encode(text))


def worked(tokenizer: Any, row: dict[str, str]) -> TrainingSample:
    """A question and its worked solution, as the chat template has them."""
    response = [*tokenizer.encode(row["answer"]), END_ID]
    return TrainingSample(chat_ids(tokenizer, row["question"]), torch.tensor(response), RowKind.SFT)


def megatron_rl(*arguments: str) -> None:
    """The documented command, as a user types it."""
    command = [sys.executable, "-m", "megatron_rl.commands.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
