"""Keys of verl, slime, NeMo-RL and TRL: an error that says ours, and the table of all of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.config.methods import find_method
from megatron_rl.config.other_names import SYSTEMS, meanings, table, translate
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError

ROOT = Path(__file__).parents[3]
PASSED_THROUGH = ("policy.megatron_cfg.", "rollout.sglang_cfg.", "exp_manager.wandb_logger_kwargs.")
"""Sections whose keys are upstream's."""


def given(*overrides: str) -> UserError:
    needed = ("policy.model_path=m", "data.task=gsm8k", "data.train=x.jsonl")
    with pytest.raises(UserError) as caught:
        load_config(ROOT / "configs/grpo.yaml", [*needed, *overrides])
    return caught.value


@pytest.mark.parametrize(
    ("override", "rule", "ours"),
    [
        ("data.train_batch_size=64", "is verl's name", "algorithm.num_prompts_per_step"),
        ("actor_rollout_ref.rollout.n=8", "is verl's name", "algorithm.num_generations_per_prompt"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=64", "is verl's name", "policy.train_global_batch_size (in responses;"),
        ("grpo.val_period=5", "is NeMo-RL's name", "eval.every_n_steps"),
        ("loss_fn.ratio_clip_max=0.28", "is NeMo-RL's name", "algorithm.ratio_clip_max"),
        ("n_samples_per_prompt=8", "is slime's name", "algorithm.num_generations_per_prompt"),
        ("use_tis=true", "is slime's name", "algorithm.correction.max_ratio"),
        ("max_completion_length=256", "is TRL's name", "rollout.max_new_tokens"),
        ("algorithm.beta=0.04", "is not a known key", "algorithm.kl.coef"),
        ("policy.learning_rate=1e-6", "is not a known key", "policy.optim.lr"),
    ],
)  # fmt: skip
def test_another_systems_key_is_translated(override: str, rule: str, ours: str) -> None:
    error = given(override)
    assert error.field == override.partition("=")[0] and error.rule == rule
    assert error.fix.startswith(f"here it is {ours}")


def test_what_is_not_here_is_said() -> None:
    error = given("actor_rollout_ref.model.lora_rank=8")
    assert error.fix == "leave it out: there is no LoRA: all weights are trained"


def test_of_a_section_the_first_key_that_is_known_is_named() -> None:
    found = translate("actor_rollout_ref", {"own": 1, "rollout": {"n": 8, "temperature": 1.0}})
    assert found is not None and (found.key, found.value) == ("actor_rollout_ref.rollout.n", 8)


@pytest.mark.parametrize(
    "override", ["policy.optim.betas=[0.9]", "algorithm.clip=1", "nothing.alike=2", "trainr.max_steps=3"]
)
def test_other_unknown_keys_keep_their_hint(override: str) -> None:
    assert given(override).rule == "is not a known key"
    assert "here it is" not in given(override).fix


@pytest.mark.parametrize("ours", sorted({meaning.ours.partition("=")[0] for meaning in meanings() if meaning.ours}))
def test_each_of_our_keys_exists(ours: str) -> None:
    if ours.startswith(PASSED_THROUGH):
        return
    first, *rest = ours.split(".")
    section = find_method("grpo") if first == "algorithm" else Config
    for part in rest if first == "algorithm" else [first, *rest]:
        section = section.__pydantic_fields__[part].annotation  # type: ignore[attr-defined]


def test_no_name_of_a_system_has_two_meanings() -> None:
    for system in SYSTEMS.values():
        names = Counter(name for meaning in meanings() for name in meaning.theirs[system])
        assert [name for name, count in names.items() if count > 1] == [], system


def test_the_page_has_the_table() -> None:
    assert table() in (ROOT / "docs/coming_from/names.md").read_text()
