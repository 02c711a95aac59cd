"""The program on a pretrained model and real problems: SFT against a plain torch loop, one step of GRPO."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.real.conftest import END_ID, GSM8K, MODEL, ROOT, chat_ids, gsm8k, megatron_rl, metrics

pytestmark = pytest.mark.timeout(900)
STEPS, ROWS, LR, WEIGHT_DECAY = 3, 4, 1e-5, 0.01
COMMON = (
    f"policy.model_path={MODEL}", "trainer.precision=fp32", "trainer.accelerator=cpu", "data.apply_chat_template=true",
    "policy.train_micro_batch_tokens=1024", "data.num_scoring_workers=1", "exp_manager.export_hf=false",
    "exp_manager.create_checkpoint_callback=false", "trainer.threads_per_rank=1",
)  # fmt: skip


def test_sft_is_a_plain_loop(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Same rows, one weight for every target token of a step, AdamW, the norm of the gradient clipped at 1."""
    megatron_rl(
        "train", str(ROOT / "configs/sft.yaml"), *COMMON, f"data.train={GSM8K}[8:{8 + STEPS * ROWS}]",
        f"exp_manager.exp_dir={tmp_path}", f"trainer.max_steps={STEPS}", f"policy.train_global_batch_size={ROWS}",
        "data.shuffle=false", 'data.template="{question}"', f"policy.optim.lr={LR}",
        f"policy.optim.weight_decay={WEIGHT_DECAY}", "policy.optim.sched={name: constant, warmup_updates: 0}",
    )  # fmt: skip
    rows = metrics(tmp_path / "sft")
    assert [row["step"] for row in rows] == [1, 2, 3]
    losses, norms = plain_loop(model, tokenizer)
    print(
        "loss here", [row["loss"] for row in rows], "plain", losses, "norms", [row["grad_norm"] for row in rows], norms
    )
    for row, loss, norm in zip(rows, losses, norms, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


def plain_loop(model: Path, tokenizer: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # Megatron keeps decay from biases and norms, as most programs do.
    matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    losses, norms = [], []
    chosen = gsm8k()[8:]
    for step in range(STEPS):
        examples = [ids_of(tokenizer, row) for row in chosen[step * ROWS : (step + 1) * ROWS]]
        total = sum(len(response) for _, response in examples)
        loss = torch.zeros((), dtype=torch.float64)
        for prompt, response in examples:
            logits = network(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            # torch's own float32 loss over 49,152 words is 8e-6 too small.
            of_row = torch.nn.functional.cross_entropy(logits.double(), response, reduction="sum") / total
            of_row.backward()
            loss = loss + of_row.detach()
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, norms


def ids_of(tokenizer: Any, row: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and solution as the page on data says: the worked steps without the calculator's marks, and the answer boxed."""
    steps, _, number = row["answer"].rpartition("####")
    solution = re.sub("<<[^<>]*>>", "", steps).strip() + f"\nThe answer is \\boxed{{{number.strip()}}}."
    return chat_ids(tokenizer, row["question"]), torch.tensor([*tokenizer.encode(solution), END_ID])


def test_grpo_on_real_problems(model: Path, tmp_path: Path) -> None:
    megatron_rl(
        "train", str(ROOT / "configs/grpo.yaml"), *COMMON, f"data.train={GSM8K}[8:]", f"exp_manager.exp_dir={tmp_path}",
        "trainer.max_steps=1", "algorithm.num_prompts_per_step=4", "algorithm.num_generations_per_prompt=4",
        "policy.train_global_batch_size=16", "rollout.max_new_tokens=32", "algorithm.overlong.buffer=16",
    )  # fmt: skip
    (row,) = metrics(tmp_path / "grpo")
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, int | float))
    assert row["num_rollouts"] == 16 and row["ratio/first_update_max_abs_log_ratio"] == 0.0
    assert row["mismatch/log_prob_abs_diff_max"] < 1e-3 and "reward/format" in row
