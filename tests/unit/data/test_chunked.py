"""What a folder of samples depends on."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rl.commands.evaluate import reward_digest
from megatron_rl.data.chunked import prompts_digest
from megatron_rl.types import Problem, Prompt


def test_another_reference_answer_is_another_set() -> None:
    digests = [
        prompts_digest([Prompt(Problem("id", "1+1?", answer), torch.tensor([3, 4]))]) for answer in ("2", "2", "3")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_another_text_of_a_reward_is_another_reward(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def score(response): return 1.0")
    before = reward_digest(f"{file}:score")
    file.write_text("def score(response): return 0.0")
    assert None not in (before, now := reward_digest(f"{file}:score")) and before != now
    assert reward_digest(None) is None and reward_digest("package.module:score") is None
