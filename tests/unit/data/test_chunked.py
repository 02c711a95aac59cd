"""Digests of what a folder of samples was made from."""

from __future__ import annotations

import torch

from megatron_rl.data.chunked import prompts_digest
from megatron_rl.types import Problem, Prompt


def test_another_reference_answer_is_another_set() -> None:
    digests = [
        prompts_digest([Prompt(Problem("id", "1+1?", answer), torch.tensor([3, 4]))]) for answer in ("2", "2", "3")
    ]
    assert digests[0] == digests[1] != digests[2]
