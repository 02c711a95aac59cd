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


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["trainer.max_step=3"], "trainer.max_step", "did you mean max_steps"),
        (["trainr.max_steps=3"], "trainr", "did you mean trainer"),
        (["algorithm.kl.coeff=1"], "algorithm.kl.coeff", "did you mean coef"),
        (["algorithm.clip=1"], "algorithm.clip", "is not a known key"),
        (
            ["algorithm.name=gpro"],
            "algorithm.name",
            "did you mean grpo?",
        ),
        (["trainer.max_steps=many"], "trainer.max_steps", "valid integer"),
        (["trainer.max_steps=0"], "trainer.max_steps", "greater than 0"),
        (["trainer.precision=fp16"], "trainer.precision", "'fp32' or 'bf16'"),
        (["trainer.stage=sft"], "algorithm.name", "belongs to trainer.stage rl"),
        (["policy.megatron_cfg.tensor_parallel_size=2"], "policy.megatron_cfg.tensor_parallel_size", "tensor_model_"),
        (["policy.megatron_cfg.num_layers=2"], "policy.megatron_cfg.num_layers", "config.json"),
        (["policy.megatron_cfg.bf16=true"], "policy.megatron_cfg.bf16", "trainer.precision"),
        (["policy.megatron_cfg.sequence_parallel=true"], "policy.megatron_cfg.sequence_parallel", "above 1"),
        (["policy.ddp_cfg.average_in_collective=true"], "policy.ddp_cfg.average_in_collective", "layout"),
        (["policy.optim.optimizer_cfg.lr=1"], "policy.optim.optimizer_cfg.lr", "has its own field"),
        (["trainer.devices=3", "policy.megatron_cfg.tensor_model_parallel_size=2"], "trainer.devices", "multiple of"),
        (["policy.train_global_batch_size=6"], "policy.train_global_batch_size", "must divide"),
        (["policy.train_global_batch_size=1", "trainer.devices=2"], "policy.train_global_batch_size", "multiple of"),
        (["policy.train_global_batch_size=8", "trainer.devices=3"], "policy.train_global_batch_size", "multiple of"),
        (["rollout.temperature=0"], "rollout.temperature", "must be above 0"),
        (["rollout.top_p=0"], "rollout.top_p", "greater than 0"),
        (["rollout.engine=recorded"], "rollout.recorded_dir", "exactly when"),
        (["algorithm.num_generations_per_prompt=1"], "algorithm.num_generations_per_prompt", "at least 2"),
        (["algorithm.ratio_clip_c=1.1"], "algorithm.ratio_clip_c", "must exceed"),
        (["algorithm.kl.estimator=k1"], "algorithm.kl.estimator", "no gradient"),
        (["algorithm.kl.placement=reward"], "algorithm.kl.estimator", "k1 only"),
        (["algorithm.overlong.buffer=99"], "algorithm.overlong.buffer", "must not exceed"),
        (["eval.after=true"], "data.validation", "problems to evaluate on"),
        (["eval.k_values=[1,16]"], "eval.k_values", "k <= num_samples"),
        (["eval.k_values=[]"], "eval.k_values", "at least one"),
        (["rollout.temperature=.nan"], "rollout.temperature", "finite number"),
        (["trainer.timeout_s=.inf"], "trainer.timeout_s", "finite number"),
        (["algorithm.ratio_clip_c=.nan"], "algorithm.ratio_clip_c", "finite number"),
        (["policy.megatron_cfg.hidden_dropout=0.1"], "policy.megatron_cfg.hidden_dropout", "different networks"),
        (["policy.megatron_cfg.attention_dropout=0.0"], "policy.megatron_cfg.attention_dropout", "different networks"),
        (["policy.ddp_cfg.overlap_param_gather=true"], "policy.ddp_cfg.overlap_param_gather", "fixed at false"),
        (
            ["policy.optim.optimizer_cfg.overlap_param_gather=true"],
            "policy.optim.optimizer_cfg.overlap_param_gather",
            "fixed at false",
        ),
        (["policy.optim.sched.name=cosine"], "policy.optim.sched.decay_updates", "number of updates"),
        (["policy.optim.min_lr=1"], "policy.optim.min_lr", "must not exceed"),
        (["policy.tokenizer_path=${nowhere}"], "policy.tokenizer_path", "cannot be resolved"),
        (
            ["policy.megatron_cfg.virtual_pipeline_model_parallel_size=2"],
            "policy.megatron_cfg.virtual_pipeline_model_parallel_size",
            "needs pipeline_model_parallel_size above 1",
        ),
        (
            [
                "policy.megatron_cfg.virtual_pipeline_model_parallel_size=2",
                "policy.megatron_cfg.pipeline_model_parallel_size=2",
                "policy.train_global_batch_size=2",
                "trainer.devices=4",
            ],
            "policy.train_global_batch_size",
            "pipeline-parallel size = 4",
        ),
        (
            ["policy.megatron_cfg.moe_router_load_balancing_type=aux_loss"],
            "policy.megatron_cfg.moe_router_load_balancing_type",
            "share a micro-batch",
        ),
        (
            ["policy.megatron_cfg.moe_z_loss_coeff=0.1", "policy.megatron_cfg.recompute_modules=[moe]"],
            "policy.megatron_cfg.recompute_modules",
            "later micro-batch",
        ),
        (
            ["policy.router_replay=true", "policy.megatron_cfg.moe_layer_recompute=true"],
            "policy.megatron_cfg.moe_layer_recompute",
            "later micro-batch",
        ),
        (["policy.optim.name=sgd"], "policy.optim.name", "adam"),
        (
            ["policy.optim.optimizer_cfg.optimizer_cpu_offload=true"],
            "policy.optim.optimizer_cfg.optimizer_cpu_offload",
            "needs use_precision_aware_optimizer",
        ),
        (
            [
                "trainer.precision=fp32",
                "policy.optim.optimizer_cfg.optimizer_cpu_offload=true",
                "policy.optim.optimizer_cfg.use_precision_aware_optimizer=true",
            ],
            "policy.optim.optimizer_cfg.optimizer_cpu_offload",
            "needs trainer.precision=bf16",
        ),
        (
            ["policy.optim.optimizer_cfg.exp_avg_dtype=bf16"],
            "policy.optim.optimizer_cfg.exp_avg_dtype",
            "without use_precision_aware_optimizer",
        ),
        (
            ["policy.optim.optimizer_cfg.main_params_dtype=bf16"],
            "policy.optim.optimizer_cfg.main_params_dtype",
            "one of fp32, fp16",
        ),
        (
            ["policy.megatron_cfg.recompute_granularity=selective", "policy.megatron_cfg.recompute_modules=[moe_act]"],
            "policy.megatron_cfg.recompute_modules",
            "must be of core_attn, mlp",
        ),
        (
            ["policy.megatron_cfg.recompute_modules=[mlp]"],
            "policy.megatron_cfg.recompute_modules",
            "does nothing without recompute_granularity: selective",
        ),
        (
            ["policy.megatron_cfg.cpu_offloading=true"],
            "policy.megatron_cfg.cpu_offloading_num_layers",
            "nor that without a number of layers",
        ),
        (
            [
                "policy.megatron_cfg.cpu_offloading=true",
                "policy.megatron_cfg.cpu_offloading_num_layers=1",
                "policy.megatron_cfg.recompute_granularity=selective",
            ],
            "policy.megatron_cfg.cpu_offloading",
            "without recompute_granularity",
        ),
        (
            ["policy.megatron_cfg.fine_grained_activation_offloading=true"],
            "policy.megatron_cfg.fine_grained_activation_offloading",
            "pinned memory",
        ),
        (["trainer"], "override", "section.field=value"),
    ],
)
def test_one_error_says_it_all(overrides: list[str], field: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert caught.value.field == field
    assert words in str(caught.value) and "Fix: " in str(caught.value)


@pytest.mark.parametrize("name", ["tensor", "pipeline", "context", "expert", "virtual_pipeline"])
@pytest.mark.parametrize("value", ["0", "-2", "two", "1.5", "true"])
def test_parallel_sizes_are_whole_and_positive(name: str, value: str) -> None:
    field = f"policy.megatron_cfg.{name}{'_parallel_size' if name == 'context' else '_model_parallel_size'}"
    with pytest.raises(UserError, match="whole number of ranks") as caught:
        load(f"{field}={value}")
    assert caught.value.field == field


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


@pytest.mark.parametrize("text", ["trainer: [", "- a\n- b\n", "trainer: {max_steps: ???}"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")


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
