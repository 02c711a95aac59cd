"""Every YAML that we ship loads, and the big ones say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import load_config

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("examples/**/*.yaml")])
for part in (
    "configs/online.yaml",
    "configs/qwen2.5_32b.yaml",
    "examples/segments/common.yaml",
):  # no configs of their own: others inherit them
    FILES.remove(ROOT / part)
GIVEN = ["policy.model_path=m", "data.train=t.jsonl", "data.task=gsm8k", "presample.problems=p.jsonl"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(path.parent)  # examples are started in their folder, where modules of their own lie
    load_config(path, GIVEN)


def test_the_32b_layout_divides() -> None:
    config = load_config(ROOT / "configs/grpo_qwen2.5_32b.yaml", GIVEN)
    assert config.data_parallel_size == 2 and config.num_updates_per_step == 16


def test_there_are_exemplars() -> None:
    assert {"grpo.yaml", "spo_chain.yaml", "spo_tree.yaml", "grpo_gsm8k.yaml", "grpo_qwen2.5_32b.yaml", "sft.yaml"} <= {
        p.name for p in FILES
    }


@pytest.mark.parametrize(("name", "gpus", "ranks"), [("grpo_1.5b_one_gpu", 1, 1), ("grpo_7b_one_node", 8, 4)])
def test_recipes_for_small_machines(name: str, gpus: int, ranks: int) -> None:
    """What they say of themselves; tests/unit/doctor holds that they fit."""
    config = load_config(ROOT / f"configs/{name}.yaml", GIVEN)
    assert (config.trainer.devices, config.data_parallel_size, config.num_updates_per_step) == (gpus, ranks, 4)
    assert config.rollout.is_colocated and config.trainer.precision == "bf16"
    assert config.data.max_prompt_tokens is not None
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    assert longest <= config.policy.train_micro_batch_tokens
