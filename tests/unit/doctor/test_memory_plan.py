"""The memory plan: what can be counted is what Megatron allocates; the 32B recipes fit where they say they do."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_rl.commands.cli import app
from megatron_rl.config import load_config
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.doctor import memory_advice
from megatron_rl.doctor.memory import GB, LOGIT_ROWS, LOGITS, estimate
from megatron_rl.doctor.memory_advice import check_fits
from megatron_rl.errors import UserError
from tests.forked import run_ranks
from tests.policy_case import build_policy, random_samples, tiny_config
from tests.tiny_models import make_tiny_model
from tests.unit.doctor.shapes import write_model

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
    return write_model(tmp_path_factory.mktemp("qwen"), "32B")


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
        # The server starts when the trainer has nothing but its weights on the GPU, and shares what it finds.
        found = 80 * GB - memory.weights - 2 * 1.5 * GB
        assert memory.server_cache(80 * GB) == pytest.approx(0.8 * found - memory.server)
        assert memory.server_cache(80 * GB) > 4 * memory.server
        assert memory.starting == memory.weights + memory.gradients + memory.optimizer + 1.5 * GB


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


def plan_of(model: Path, *overrides: str, file: str = "grpo.yaml") -> Any:
    given = (f"policy.model_path={model}", "data.train=t.jsonl", "data.task=gsm8k", *overrides)
    return estimate(load_config(ROOT / "configs" / file, given))[0]


def test_the_engine_in_process_has_a_model_of_its_own_on_every_rank(tmp_path: Path) -> None:
    model, eight = write_model(tmp_path, "7B"), "trainer.devices=8"
    own, recorded = plan_of(model, eight), plan_of(model, eight, "rollout.engine=recorded", "rollout.recorded_dir=r")
    assert own.engine == 2 * recorded.num_parameters and recorded.engine == 0 == recorded.engine_cache
    assert own.updating - recorded.updating == own.starting - recorded.starting == own.engine
    sft = load_config(ROOT / "configs/sft.yaml", [f"policy.model_path={model}", "data.train=t", "data.task=gsm8k"])
    assert estimate(sft)[0].engine == 0, "without evaluation it samples nothing"


def test_a_colocated_server_keeps_something(tmp_path: Path) -> None:
    model = write_model(tmp_path, "1.5B")
    colocated = plan_of(model, file="grpo_1.5b_one_gpu.yaml")
    separate = plan_of(model, "rollout.servers.placement=separate", file="grpo_1.5b_one_gpu.yaml")
    assert colocated.updating - separate.updating == 3 * GB and separate.residue == separate.server == 0


def test_a_server_is_shared_out_over_its_tensor_and_pipeline_ranks(tmp_path: Path) -> None:
    model, two = write_model(tmp_path, "7B"), "rollout.servers.num_per_node=2"
    stages = ("rollout.sglang_cfg.tp_size=2", "rollout.sglang_cfg.pp_size=2")
    plans = [
        plan_of(model, two, *sizes, file="grpo_7b_one_node.yaml")
        for sizes in (stages, ("rollout.sglang_cfg.tp_size=4",))
    ]
    assert plans[0].server == plans[1].server > 0


def test_servers_over_more_nodes_are_tried_where_one_fills_its_node(tmp_path: Path) -> None:
    model = write_model(tmp_path, "32B")
    given = [f"policy.model_path={model}", "data.train=t", "data.task=gsm8k"]
    config = load_config(ROOT / "configs/grpo_qwen2.5_32b.yaml", given)
    nodes = "rollout.servers.nodes_per_server"
    tried = [changes for _, changes in memory_advice._rollouts(config) if nodes in changes]
    assert [(changes[nodes], changes["rollout.sglang_cfg.tp_size"]) for changes in tried] == [(2, 16), (4, 32)]
    smaller = [estimate(memory_advice.with_changes(config, changes))[0].server for changes in tried]
    assert smaller == [estimate(config)[0].server // 2, estimate(config)[0].server // 4]
    two = memory_advice.with_changes(config, {"trainer.num_nodes": 2})
    assert [changes[nodes] for _, changes in memory_advice._rollouts(two) if nodes in changes] == [2]


def test_gradients_in_16_bits_are_copied_when_the_optimizer_steps(tmp_path: Path) -> None:
    model = write_model(tmp_path, "0.5B")
    summed = "policy.ddp_cfg.grad_reduce_in_fp32=false"
    few = ("policy.train_micro_batch_tokens=256", summed)
    plan = plan_of(model, *few)
    assert plan.stepping == 4 * plan.num_parameters == plan.updating - plan.starting > plan.activations + plan.working
    assert plan_of(model, *few, "trainer.devices=2").stepping == plan.stepping / 2
    assert plan_of(model, summed, "policy.optim.optimizer_cfg.use_precision_aware_optimizer=true").stepping == 0
    assert plan_of(model).stepping == plan_of(model, summed, "trainer.precision=fp32").stepping == 0


def test_the_output_layer_has_a_stand_in_for_its_gradient_unless_it_is_the_embedding(tmp_path: Path) -> None:
    tokens = "policy.train_micro_batch_tokens=1024"
    block = 2**26 * (4 + 2)
    seven = plan_of(write_model(tmp_path, "7B"), tokens)
    assert seven.working == block + 1024 * 3584 * (4 + 2 * 2) + 152064 * 3584 * 2
    half = plan_of(write_model(tmp_path, "0.5B"), tokens)
    assert half.working == block + 1024 * 896 * (4 + 2 * 2)


@pytest.mark.parametrize(("name", "model"), [("grpo_1.5b_one_gpu", "1.5B"), ("grpo_7b_one_node", "7B")])
def test_recipes_for_small_machines_fit_with_a_tenth_to_spare(name: str, model: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, model)
    command = ["plan", "memory", str(ROOT / f"configs/{name}.yaml"), f"policy.model_path={path}", "data.train=t.jsonl"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "fits: " in done.output and "tight" not in done.output
    assert "at the start" in done.output and "the server's cache, by mem_fraction_static 0.8" in done.output
    assert plan_of(path, file=f"{name}.yaml").needed < 72 * GB


def test_what_does_not_fit_is_said_with_overrides_that_do(tmp_path: Path) -> None:
    path = write_model(tmp_path, "7B")
    recipe = str(ROOT / "configs/grpo_7b_one_node.yaml")
    command = ["plan", "memory", recipe, f"policy.model_path={path}", "data.train=t.jsonl", "--gpu-gb", "40"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "does not fit: " in done.output
    line = done.output.splitlines()[-1].partition(" with: ")[2]
    assert CliRunner().invoke(app, [*command, *shlex.split(line)]).exit_code == 0


def test_a_gpu_that_is_too_small_is_one_error_before_anything_is_built(tmp_path: Path) -> None:
    path = write_model(tmp_path, "32B")
    config = load_config(ROOT / "configs/grpo_qwen2.5_32b.yaml", [f"policy.model_path={path}", "data.train=t.jsonl"])
    shape = read_shape(path)
    check_fits(config, shape, rank=16, stage=1, gpu_bytes=int(80 * GB), longest=10240)
    with pytest.raises(UserError) as caught:
        check_fits(config, shape, rank=16, stage=1, gpu_bytes=int(40 * GB), longest=10240)
    error = caught.value
    assert (error.field, error.value) == ("GPU of rank 16", "40.0 GB")
    assert "pipeline stage 1 needs 42.1 GB while updating" in error.rule
    assert "add policy." in error.fix and "trainer.check_memory=false" in error.fix
    with pytest.raises(UserError, match=r"no setting that was tried fits: .* GB are missing"):
        check_fits(config, shape, rank=0, stage=0, gpu_bytes=int(10 * GB), longest=10240)


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
