"""``megatron-rl doctor layout``: what it makes of a config, and that it finds a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.doctor.layout import scale_down
from tests.policy_case import CONFIG

ROOT = Path(__file__).parents[3]
SHAPE = {
    "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "vocab_size": 152064,
    "num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
    "use_sliding_window": False, "torch_dtype": "bfloat16", "hidden_act": "silu", "architectures": ["Qwen2ForCausalLM"],
}  # fmt: skip
EXPERTS = {
    "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
    "architectures": ["Qwen3MoeForCausalLM"],
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of 32 billion parameters, as far as the doctor looks: its config.json."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def overrides(model: Path, *more: str) -> list[str]:
    return [f"policy.model_path={model}", "policy.megatron_cfg.tensor_model_parallel_size=8", *more]


LARGE = (
    "policy.megatron_cfg.sequence_parallel=true", "policy.megatron_cfg.pipeline_model_parallel_size=4",
    "policy.megatron_cfg.virtual_pipeline_model_parallel_size=4", "policy.megatron_cfg.recompute_granularity=full",
    "policy.megatron_cfg.recompute_method=uniform", "policy.megatron_cfg.recompute_num_layers=4",
    "policy.megatron_cfg.fp8=hybrid", "trainer.devices=8", "trainer.num_nodes=8", "policy.train_global_batch_size=16",
)  # fmt: skip


def doctor(*arguments: str, code: str = "") -> subprocess.CompletedProcess:
    program = f"{code}\nimport sys; from megatron_rl.commands.cli import main; sys.argv[0] = 'megatron-rl'; main()"
    command = [sys.executable, "-c", program, "doctor", "layout", str(CONFIG), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_sizes_become_two(model: Path) -> None:
    scaled = scale_down(load_config(CONFIG, overrides(model, *LARGE)), model)
    assert scaled.sizes == {"tp": 2, "pp": 2, "vpp": 2, "dp": 2} and scaled.config.trainer.world_size == 8
    assert "fp8" in scaled.left_out
    kept = scaled.config.policy.megatron_cfg
    assert kept["sequence_parallel"] and kept["recompute_num_layers"] == 1 and "fp8" not in kept


def test_any_number_of_rows_will_do(model: Path) -> None:
    rows = ("algorithm.num_prompts_per_step=6", "algorithm.num_generations_per_prompt=6")
    config = load_config(CONFIG, overrides(model, *rows, "trainer.devices=8", "policy.train_global_batch_size=18"))
    assert scale_down(config, model).config.policy.train_global_batch_size == 8


@pytest.mark.slow
def test_a_layout_is_checked(model: Path) -> None:
    done = doctor(*overrides(model, *LARGE))
    assert done.returncode == 0, done.stderr
    assert "8 processes" in done.stdout and "WRONG" not in done.stdout and "fp8" in done.stdout


@pytest.mark.slow
def test_experts_with_their_auxiliary_loss_are_checked(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(SHAPE | EXPERTS))
    balance = "policy.megatron_cfg.moe_router_load_balancing_type=seq_aux_loss"
    sizes = ("policy.megatron_cfg.sequence_parallel=true", "policy.megatron_cfg.expert_model_parallel_size=8")
    more = ("policy.megatron_cfg.expert_tensor_parallel_size=1", "policy.megatron_cfg.moe_aux_loss_coeff=0.01")
    done = doctor(*overrides(model, *sizes, *more, balance, "trainer.devices=8"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_mistake_is_found_and_named(model: Path) -> None:
    wrong = """
import megatron_rl.patches; megatron_rl.patches.apply("cpu")
from megatron_rl.parallel.vocab import _Block
add = _Block.sum
_Block.sum = lambda self, *values: (values[0].clone(), *add(self, *values)[1:])
"""
    done = doctor(*overrides(model, "trainer.devices=8"), code=wrong)
    assert done.returncode == 1, done.stderr
    assert "WRONG" in done.stdout and "model.embed_tokens.weight: " in done.stdout


@pytest.mark.slow
def test_what_cannot_be_built_is_one_line(model: Path) -> None:
    done = doctor(f"policy.model_path={model / 'nowhere'}")
    assert done.returncode == 2 and done.stderr.startswith("error: policy.model_path") and done.stderr.count("\n") == 1
