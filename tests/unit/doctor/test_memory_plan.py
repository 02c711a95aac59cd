"""The memory plan: what can be counted is what Megatron allocates; the 32B recipes fit where they say they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import load_config
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.doctor.memory import GB, LOGIT_ROWS, LOGITS, estimate
from megatron_rl.errors import UserError
from tests.forked import run_ranks
from tests.policy_case import build_policy, random_samples, tiny_config
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[3]
LAYOUTS: list[dict[str, Any]] = [
    {}, {"tp": 2, "sp": True}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"dp": 2}, {"tp": 2, "sp": True, "pp": 2}, {"cp": 2},
]  # fmt: skip
EXPERTS = "policy.megatron_cfg.expert_model_parallel_size=2"


def allocated(model: Path, layout: dict[str, Any], overrides: tuple[str, ...]) -> tuple[int, int, int, int, int]:
    """(pipeline stage, parameters, bytes of weights, gradients, optimizer state) of this rank, after an update."""
    from megatron_rl.algorithms.grpo import GRPO

    config = tiny_config(model, *overrides, "algorithm.kl.coef=0", **layout)
    policy = build_policy(config)
    rows = random_samples()
    policy.train_step(rows, GRPO(config).loss)
    freed_state = sum(tensor.nbytes for tensor in policy.trainable.update_memory._state())
    parameters = list(policy.trainable.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    gradients = sum(buffer.grad_data.nbytes for buffer in policy.trainable.gradient_buffers())
    return policy.groups.pp_rank, sum(p.numel() for p in parameters), weights, gradients, freed_state


EXPERT_LAYOUTS: list[dict[str, Any]] = [{"dp": 2}, {"tp": 2, "sp": True, "dp": 2}]
CASES = [
    *(("qwen3", True, layout, ("trainer.precision=bf16",)) for layout in LAYOUTS),
    *(("qwen3", False, layout, ("trainer.precision=fp32",)) for layout in ({}, {"dp": 2}, {"pp": 2})),
    *(("qwen3_moe", False, layout, ("trainer.precision=bf16",)) for layout in EXPERT_LAYOUTS),
    *(("qwen3_moe", False, layout, ("trainer.precision=bf16", EXPERTS)) for layout in EXPERT_LAYOUTS),
    ("deepseek_v3", False, {"tp": 2, "sp": True}, ("trainer.precision=bf16",)),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_can_be_counted_is_what_is_allocated(
    case: tuple[Any, bool, dict, tuple[str, ...]], tmp_path: Path
) -> None:
    family, tied, layout, overrides = case
    model = make_tiny_model(tmp_path, family, tied=tied, seed=1, num_hidden_layers=4)
    plan = {memory.stage: memory for memory in estimate(tiny_config(model, *overrides, **layout))}
    ranks = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1) * layout.get("cp", 1)
    for stage, count, weights, gradients, state in run_ranks(allocated, ranks, model, layout, overrides):
        memory = plan[stage]
        assert (memory.num_parameters, memory.weights) == (count, weights)
        assert memory.gradients == pytest.approx(gradients, rel=0.01)  # padding of the buffers
        assert memory.optimizer == pytest.approx(state, rel=0.02)


def saved_for_backward(model: Path, *overrides: str) -> tuple[int, int]:
    """(Bytes that an update saves for backward, its tokens), of all micro-batches together."""
    import torch

    from megatron_rl.algorithms.grpo import GRPO

    config, rows = tiny_config(model, "algorithm.kl.coef=0", *overrides), random_samples()
    policy, saved = build_policy(config), []  # held, so that no two share an address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.train_step(rows, GRPO(config).loss)
    tokens = sum(len(batch.input_ids) for batch in policy.trainable.micro_batches(rows))
    return sum({storage.data_ptr(): storage.nbytes() for storage in saved}.values()), tokens


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_fused_activation_saves_what_the_plan_says(family: Any, tmp_path: Path) -> None:
    """All but the activation function is the same with and without."""
    model = make_tiny_model(tmp_path, family, tied=False, seed=1)
    choices = [f"policy.megatron_cfg.bias_activation_fusion={choice}" for choice in ("true", "false")]
    (fused, tokens), (unfused, _) = (run_ranks(saved_for_backward, 1, model, choice)[0] for choice in choices)
    config = tiny_config(model, choices[1])
    planned = estimate(config)[0].activations - estimate(tiny_config(model, choices[0]))[0].activations
    assert (unfused - fused) / tokens == pytest.approx(planned / config.policy.train_micro_batch_tokens, rel=0.01)


def test_logits_are_those_of_the_code_that_holds_them() -> None:
    from megatron_rl.parallel import vocab

    assert (vocab.CHUNK_TOKENS["cuda"], vocab.BLOCK_ELEMENTS["cuda"]) == (LOGIT_ROWS, LOGITS)


@pytest.fixture(scope="module")
def qwen_32b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-32B's shape."""
    directory = tmp_path_factory.mktemp("qwen")
    fields = {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
        "hidden_act": "silu", "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


FP8 = ("policy.megatron_cfg.fp8=e4m3", "policy.megatron_cfg.fp8_recipe=blockwise")


@pytest.mark.parametrize("nodes", [4, 8])
@pytest.mark.parametrize("bits", [(), FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("method", ["grpo", "dph", "spo"])
def test_32b_recipes_fit_80_gb(method: str, bits: tuple[str, ...], nodes: int, qwen_32b: Path) -> None:
    given = [
        f"policy.model_path={qwen_32b}",
        "data.train=t.jsonl",
        "presample.problems=p.jsonl",
        f"trainer.num_nodes={nodes}",
    ]
    config = load_config(ROOT / f"configs/{method}_qwen2.5_32b.yaml", [*given, *bits])
    found = estimate(config)
    assert sum(memory.num_parameters for memory in found) * 8 == pytest.approx(32.76e9, rel=0.01)
    for memory in found:
        assert memory.updating < 72 * GB, "a tenth is left for fragments"
        # The server takes its share of the whole GPU while the trainer's weights are there.
        share = config.rollout.sglang_cfg["mem_fraction_static"] * 80 * GB
        assert memory.server < share / 2 and memory.sampling - memory.server + share < 80 * GB
        assert memory.starting - memory.server + share < 80 * GB


def test_it_would_notice_a_layout_that_does_not(qwen_32b: Path) -> None:
    given = [f"policy.model_path={qwen_32b}", "data.train=t.jsonl"]
    path = ROOT / "configs/grpo_qwen2.5_32b.yaml"
    one_node = load_config(path, [*given, "trainer.num_nodes=1", "policy.megatron_cfg.pipeline_model_parallel_size=1"])
    assert max(memory.updating for memory in estimate(one_node)) > 80 * GB
    kept = ("policy.megatron_cfg.recompute_granularity=null", "policy.train_micro_batch_tokens=65536")
    assert max(memory.updating for memory in estimate(load_config(path, [*given, *kept]))) > 80 * GB


def test_types_of_the_optimizer_reach_megatron(tmp_path: Path) -> None:
    """As types, not as their names; another name is refused before torch is imported."""
    model = make_tiny_model(tmp_path, "qwen3", tied=True, seed=1)
    precise = ("policy.optim.optimizer_cfg.exp_avg_dtype=fp32", "policy.optim.optimizer_cfg.main_params_dtype=fp32")

    def found() -> bool:
        import torch

        return build_policy(tiny_config(model, *precise)).trainable.optimizer.config.exp_avg_dtype is torch.float32

    assert run_ranks(found, 1) == [True]
    with pytest.raises(UserError, match="exp_avg_dtype = 'float8': must be one of fp32, fp16, bf16, fp8"):
        tiny_config(model, "policy.optim.optimizer_cfg.exp_avg_dtype=float8")


@pytest.mark.slow
def test_options_save_what_they_say(qwen_32b: Path) -> None:
    given = [f"policy.model_path={qwen_32b}", "data.train=t.jsonl"]

    def of(*overrides: str) -> Any:
        config = load_config(ROOT / "configs/grpo_qwen2.5_32b.yaml", [*given, *overrides])
        return estimate(config, read_shape(qwen_32b))[0]

    base = of()
    assert base.optimizer == pytest.approx(12 / 2 * base.num_parameters)
    precise = "policy.optim.optimizer_cfg.use_precision_aware_optimizer=true"
    small = of(
        precise, "policy.optim.optimizer_cfg.exp_avg_dtype=bf16", "policy.optim.optimizer_cfg.exp_avg_sq_dtype=bf16"
    )
    # Two moments of 16 bits, and 16 bits of the main weight: the other 16 are the model's own.
    assert small.optimizer == pytest.approx(6 / 2 * base.num_parameters)
    assert of(precise).optimizer == pytest.approx(10 / 2 * base.num_parameters)
    assert of(precise, "policy.optim.optimizer_cfg.store_param_remainders=false").optimizer == base.optimizer
    offloaded = (precise, "policy.optim.optimizer_cfg.optimizer_cpu_offload=true")
    # Megatron offloads nothing unless told how much.
    assert of(*offloaded, "policy.optim.optimizer_cfg.optimizer_offload_fraction=1.0").optimizer == 0
    half = of(*offloaded, "policy.optim.optimizer_cfg.optimizer_offload_fraction=0.5")
    assert half.optimizer == pytest.approx(6 / 2 * base.num_parameters)
    assert of(*offloaded).optimizer == base.optimizer
    assert of("policy.ddp_cfg.grad_reduce_in_fp32=false").gradients == base.gradients / 2
    assert of("trainer.offload_during_rollouts=false").sampling - base.sampling == base.gradients + base.optimizer
    assert of("weight_sync.quantization=fp8_block").server == pytest.approx(base.server / 2)
    eight = of(*FP8)
    assert base.weights < eight.weights < 2 * base.weights
    assert eight.activations <= base.activations
    selective = "policy.megatron_cfg.recompute_granularity=selective"
    again = of(selective, "policy.megatron_cfg.recompute_modules=[mlp]")
    token = 2 * 32 * 12288 / 8  # of two micro-batches, in half of the layers, on one of eight ranks
    assert base.activations - again.activations == pytest.approx(token * 3 * 27648 * 2)
    one_stage = "policy.megatron_cfg.pipeline_model_parallel_size=1"
    offloaded = ("policy.megatron_cfg.cpu_offloading=true", "policy.megatron_cfg.cpu_offloading_num_layers=48")
    assert of(one_stage, *offloaded).activations == pytest.approx(of(one_stage).activations / 4)
