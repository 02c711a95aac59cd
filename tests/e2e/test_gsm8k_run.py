"""The README's command on GSM8K, with a tiny random model: on a few rows of the format, and on the real file where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import run_main
from tests.forked import run_ranks
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared/data/gsm8k_train.jsonl"


@pytest.mark.parametrize("is_real", [False, True])
def test_grpo_on_gsm8k(tmp_path: Path, is_real: bool) -> None:
    train = GSM8K
    if not is_real:
        train = tmp_path / "train.jsonl"
        rows = [{"question": f"What is {n} plus 2?", "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}"} for n in range(20)]
        train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif not GSM8K.exists():
        pytest.skip("the GSM8K file is not part of the repository")
    model = make_tiny_model(
        tmp_path / "model", "llama", tied=False, seed=1, tokenizer=True, max_position_embeddings=2048
    )
    overrides = [
        f"policy.model_path={model}", f"data.train={train}", f"exp_manager.exp_dir={tmp_path}", "trainer.precision=fp32",
        "trainer.max_steps=2", "trainer.devices=2", "algorithm.num_prompts_per_step=4", "rollout.max_new_tokens=16",
        "algorithm.num_generations_per_prompt=4", "policy.train_global_batch_size=8", "algorithm.overlong.buffer=8",
    ]  # fmt: skip
    assert run_ranks(run_main, 2, [str(ROOT / "configs/grpo_gsm8k.yaml"), *overrides], timeout_s=120) == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "grpo_gsm8k/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all("reward/correct" in row and row["ratio/first_update_max_abs_log_ratio"] == 0 for row in rows)
    assert (tmp_path / "grpo_gsm8k/hf/model.safetensors").exists()
