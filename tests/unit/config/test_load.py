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


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(TINY.read_text())
    (tmp_path / "own.yaml").write_text("defaults: ~/base.yaml\n")
    config = load_config(
        tmp_path / "own.yaml", ["policy.model_path=~/m", "exp_manager.exp_dir=~/r", "data.validation=~/v.jsonl"]
    )
    assert (config.policy.model_path, config.exp_manager.exp_dir) == (f"{tmp_path}/m", f"{tmp_path}/r")
    assert config.data.validation == [f"{tmp_path}/v.jsonl"] and config.data.held_out == {"": [f"{tmp_path}/v.jsonl"]}


@pytest.mark.parametrize(
    "override",
    [
        *(
            f"exp_manager.name={name}"
            for name in ("grpo-1", "a b", "über", "..a", "~x", "-x", ".hidden", "'7'", "n" * 200)
        ),
        *(f"exp_manager.exp_dir={path}" for path in (".", "../x", "/x/../y", "./~x", "a:b", "é/ü")),
        "trainer.seed=4294967295",
        "trainer.max_steps=1e3",
        "trainer.max_steps=1_000",
        "trainer.max_steps='7'",
        "trainer.timeout_s=1",
        "trainer.hang_timeout_s=null",
        "data.scoring_timeout_s=2000000",
        "rollout.temperature=1000",
        "rollout.top_k=0",
        "rollout.servers.base_port=65535",
        "rollout.servers.urls=['http://h', 'https://node-7.lab:30000', 'http://[::1]:3000', 'http://10.0.0.1:80/path']",
        "policy.optim.min_lr=0",
        "policy.optim.lr=1.2e-38",
        "eval.before=0",
        "data.template='1:30 {question}'",
    ],
)
def test_what_can_work_is_taken(override: str) -> None:
    load(override)


def test_an_environment_variable_may_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "7")
    assert load("trainer.max_steps=${oc.env:STEPS}").trainer.max_steps == 7
    config = load("policy.ddp_cfg.bucket_size=${oc.decode:${oc.env:STEPS}}")
    assert config.policy.ddp_cfg == {"bucket_size": 7}


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
