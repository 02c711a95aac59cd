"""Bad configs: one error, the dotted key, the value, the rule, the fix. And none of it loads torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from megatron_rl.config import load_config, save_resolved
from megatron_rl.errors import UserError

TINY = Path(__file__).parents[2] / "tiny.yaml"


def load(*overrides: str):
    return load_config(TINY, ["policy.model_path=model", *overrides])


def test_no_virtual_stages_may_be_said_as_megatron_says_it() -> None:
    load("policy.megatron_cfg.virtual_pipeline_model_parallel_size=null")


def test_a_resolved_config_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written") as caught:
        save_resolved(load(), tmp_path / "file/config.yaml")
    assert caught.value.field == "exp_manager.exp_dir"


def test_a_value_that_only_the_user_knows_must_be_given() -> None:
    with pytest.raises(UserError, match=r"policy.model_path: has no default"):
        load_config(TINY)


def test_defaults_are_inherited_and_overridden_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(TINY.read_text())
    (tmp_path / "b.yaml").write_text("defaults: a.yaml\ntrainer: {max_steps: 9, seed: 1}\npolicy: {model_path: m}\n")
    (tmp_path / "c.yaml").write_text('defaults: [b.yaml]\ntrainer: {seed: "${trainer.max_steps}"}\n')
    config = load_config(tmp_path / "c.yaml", ["trainer.max_steps=5"])
    assert (config.trainer.max_steps, config.trainer.seed, config.trainer.precision) == (5, 5, "fp32")


def test_a_circle_of_defaults_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults: b.yaml\n")
    (tmp_path / "b.yaml").write_text("defaults: a.yaml\n")
    with pytest.raises(UserError, match=r"a.yaml -> b.yaml -> a.yaml"):
        load_config(tmp_path / "a.yaml")


def test_the_resolved_config_repeats_the_run(tmp_path: Path) -> None:
    config = load("algorithm.ratio_clip_max=0.28")
    save_resolved(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_sections_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        load().trainer.max_steps = 3


def test_updates_per_step() -> None:
    assert load("algorithm.num_epochs=3").num_updates_per_step == 6


def test_neither_config_nor_command_line_loads_torch() -> None:
    code = (
        "import sys\nfrom megatron_rl.config import load_config\nimport megatron_rl.commands.cli\n"
        f"load_config({str(TINY)!r}, ['policy.model_path=m', 'policy.megatron_cfg.fp8=hybrid'])\n"
        "assert not {'torch', 'megatron.core', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
