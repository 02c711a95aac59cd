"""``megatron-rl plan memory CONFIG``: estimate what one GPU of each pipeline stage will hold (docs/memory.md).

Weights, gradients and optimizer state are counted parameter by parameter, from the table of the model and the layout: exact,
padding of buffers apart. Activations are estimated from the tensors that Transformer Engine's layers keep for backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any

from megatron_rl.config import Config, read_model_shape
from megatron_rl.config.policy import DTYPE_BYTES
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import padded_vocab_size, shard_shape
from megatron_rl.convert.tables.table import Entry, entries
from megatron_rl.weight_sync.layouts import rollout_layout, training_layout

GB = 1e9
LOGIT_ROWS, LOGITS = 8192, 1 << 26
"""Tokens of a chunk, and logits that exist at a time: ``parallel.vocab``'s ``CHUNK_TOKENS`` and ``BLOCK_ELEMENTS``."""
CONTEXT_BYTES = int(1.5 * GB)
"""Bytes that a process takes before any tensor: CUDA's context, buffers of NCCL and cuBLAS."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the fullest GPU of one pipeline stage."""

    stage: int
    num_parameters: int
    """Number of parameters on that GPU."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Activations kept for backward, of all micro-batches in flight."""
    working: int
    """Bytes on top while one layer, or the output layer, is computed."""
    server: int
    """Weights of the rollout server that shares the GPU; 0 if none does."""
    offloads: bool
    """True if gradients and optimizer state leave the GPU while rollouts are sampled."""

    @property
    def updating(self) -> int:
        """Bytes during an update; a colocated server has released its memory."""
        static = self.weights + self.gradients + self.optimizer
        return static + self.activations + self.working + CONTEXT_BYTES

    @property
    def starting(self) -> int:
        """Bytes while a checkpoint is read at the start: nothing is offloaded yet, and a colocated server may run."""
        return self.weights + self.gradients + self.optimizer + self.server + 2 * CONTEXT_BYTES

    @property
    def sampling(self) -> int:
        """Bytes while rollouts are sampled, without the server's KV cache, which gets the rest."""
        kept = 0 if self.offloads else self.gradients + self.optimizer
        return self.weights + kept + self.server + 2 * CONTEXT_BYTES


def estimate(config: Config, shape: ModelShape | None = None) -> list[StageMemory]:
    """Estimate each pipeline stage.

    Args:
        config: the run's.
        shape: the model's; None reads it.

    Raises:
        UserError: the model cannot be read, or the layout does not fit it.
    """
    shape = read_model_shape(config) if shape is None else shape
    layout, policy = training_layout(config, shape), config.policy
    passed = policy.megatron_cfg
    width = 2 if config.trainer.precision == "bf16" else 4
    per_stage = layout.tp_size * layout.dp_size
    expert_replicas = per_stage // (layout.expert_tp_size * layout.ep_size)
    server = _server_bytes(config, shape, width) if config.rollout.is_colocated else 0
    found = []
    for stage in range(layout.pp_size):
        count = {"dense": 0, "expert": 0, "linear": 0}
        for entry in entries(shape).values():
            is_shared = entry.is_copy and layout.pp_size == 1
            if is_shared or entry.is_float32 or layout.stage_of(entry, shape.num_layers) != stage:
                continue  # in float32 are the biases of routers alone: a few numbers, without gradient
            _, cut, ranks = layout.holders(entry, shape)[0]
            if stage * per_stage not in ranks:  # an expert of other ranks
                continue
            size = prod(shard_shape(entry.kind, shape, cut))
            count["dense" if entry.expert is None else "expert"] += size
            count["linear"] += size if _is_linear(entry) else 0
        total = count["dense"] + count["expert"]
        state = _optimizer_bytes(config)
        reduced_in_fp32 = policy.ddp_cfg.get("grad_reduce_in_fp32", True)
        found.append(
            StageMemory(
                stage=stage,
                num_parameters=total,
                weights=_weight_bytes(passed, total, count["linear"], width),
                gradients=total * (4 if reduced_in_fp32 else width),
                optimizer=round(state * (count["dense"] / layout.dp_size + count["expert"] / max(1, expert_replicas))),
                activations=_activation_bytes(config, shape, stage, width),
                working=_working_bytes(config, shape, stage, width),
                server=server,
                offloads=config.offloads_during_rollouts,
            )
        )
    return found


def _is_linear(entry: Entry) -> bool:
    """Return True for a weight that FP8 layers multiply with."""
    name = entry.name
    return (
        name.startswith("decoder.layers.")
        and name.endswith(".weight")
        and len(entry.kind.dims) > 1
        and "router" not in name
    )


def _weight_bytes(passed: Mapping[str, Any], total: int, linear: int, width: int) -> int:
    if not passed.get("fp8"):
        return total * width
    # Eight bits, and the transpose of them that backward multiplies with, beside the weight.
    return total * width + 2 * linear


def _optimizer_bytes(config: Config) -> float:
    """Return the optimizer's bytes a parameter on the GPU, before data-parallel ranks share them."""
    passed = config.policy.optim.optimizer_cfg
    # In float32 the model's own weights are the main ones.
    main = 4 if config.trainer.precision == "bf16" else 0
    if passed.get("optimizer_cpu_offload"):
        # All of the share goes, and what stays is in float32 whatever the types: Megatron does not hand them on here.
        return (main + 8) * (1 - float(passed.get("optimizer_offload_fraction", 0.0)))
    if not passed.get("use_precision_aware_optimizer"):
        return main + 8
    moments = sum(DTYPE_BYTES[passed.get(name, "fp32")] for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    main_bytes = DTYPE_BYTES[passed.get("main_params_dtype", "fp32")]
    # Of a float32 main weight, the upper 16 bits are the model's own.
    return moments + (2 if main and passed.get("store_param_remainders", True) else main_bytes)


@dataclass(frozen=True)
class _Layer:
    """Bytes that one layer keeps for one token, on one tensor-parallel rank."""

    stream: float
    """The layer's input."""
    norms: float
    attention: float
    """Attention, without ``mla_up_proj``."""
    mla_up_proj: float = 0.0
    """These four under their names in ``recompute_modules``."""
    mlp: float = 0.0
    moe: float = 0.0
    shared_experts: float = 0.0

    @property
    def all(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def _layer(config: Config, shape: ModelShape, width: int) -> _Layer:
    policy, passed = config.policy, config.policy.megatron_cfg
    tp = policy.tensor_parallel_size
    streams = tp if passed.get("sequence_parallel") else 1
    saved = 1 if passed.get("fp8") else width  # inputs of products are kept in eight bits
    hidden = shape.hidden_size
    parts: dict[str, float] = {}
    if shape.latent is None:
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        # Query, key and value; query and key once more, rotated; what goes into the projection.
        attention = ((queries + 2 * keys) * width + (queries + keys) * width + queries * saved) / tp
    else:
        latent, heads = shape.latent, shape.num_attention_heads
        head = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        ranks = (latent.q_lora_rank or 0) + latent.kv_lora_rank + latent.qk_rope_head_dim
        attention = 2 * ranks * saved + heads * latent.v_head_dim * saved / tp
        parts["mla_up_proj"] = heads * (2 * head + latent.v_head_dim) * width / tp
    if passed.get("bias_activation_fusion", passed.get("transformer_impl") != "local"):
        gates, weighting = 2 * (1 if passed.get("activation_func_fp8_input_store") else width), 0
    else:  # both factors of the product as well, and of an expert what its weight multiplies
        gates, weighting = 4 * width, width
    if shape.num_experts:
        cut = passed.get("expert_tensor_parallel_size") or tp
        chosen, ffn = shape.num_experts_per_tok, shape.moe_intermediate_size
        # A token's copies at its experts, balanced, which each of an expert's ranks has whole; the shared ones beside them.
        parts["moe"] = chosen * (hidden * (saved * cut + width) + ffn * (gates + weighting + saved)) / tp
        parts["shared_experts"] = (gates + saved) * (shape.dims["shared_ffn"] if shape.num_shared_experts else 0) / tp
    else:
        parts["mlp"] = (gates + saved) * shape.intermediate_size / tp
    return _Layer(
        stream=hidden * width / streams,
        norms=(hidden * width + 2 * hidden * saved) / streams,
        attention=attention,
        **parts,
    )


def _kept(layer: _Layer, passed: Mapping[str, Any]) -> float:
    """Return the bytes a token that a layer keeps if it is not recomputed as a whole."""
    if passed.get("recompute_granularity") != "selective":
        return layer.all
    modules = set(passed.get("recompute_modules") or ())
    modules |= {"shared_experts"} if "moe" in modules else set()
    # Flash attention keeps nothing of core_attn; that of the norms is small.
    again = modules & {"mla_up_proj", "mlp", "moe", "shared_experts"}
    return layer.all - sum(getattr(layer, module) for module in again)


def _tokens(config: Config) -> int:
    """Return the tokens of one micro-batch on one context-parallel rank."""
    return config.policy.train_micro_batch_tokens // config.policy.context_parallel_size


def _activation_bytes(config: Config, shape: ModelShape, stage: int, width: int) -> int:
    policy, passed = config.policy, config.policy.megatron_cfg
    pp, vpp = policy.pipeline_parallel_size, policy.virtual_pipeline_size
    layers = shape.num_layers // (pp * vpp)
    # Chunks whose backward has not come yet when this stage has most of them.
    in_flight = (pp - stage - 1) * 2 + (vpp - 1) * pp + 1 if vpp > 1 else pp - stage
    layer = _layer(config, shape, width)
    if passed.get("recompute_granularity") == "full":
        group = int(passed.get("recompute_num_layers") or 1)
        if passed.get("recompute_method") == "block":
            per_token = group * layer.stream + max(0, layers - group) * layer.all
        else:
            per_token = -(-layers // group) * layer.stream
    else:
        per_token = (layers - int(passed.get("cpu_offloading_num_layers") or 0)) * _kept(layer, passed)
    return round(per_token * _tokens(config) * in_flight)


def _working_bytes(config: Config, shape: ModelShape, stage: int, width: int) -> int:
    """Return the larger of: layers recomputed at a time; logits of one chunk with their gradient."""
    policy, passed = config.policy, config.policy.megatron_cfg
    tokens, layer = _tokens(config), _layer(config, shape, width)
    group = int(passed.get("recompute_num_layers") or 1) if passed.get("recompute_granularity") == "full" else 1
    group = group if passed.get("recompute_method") != "block" else 1
    # Gradients of a layer's tensors exist while it is derived.
    largest = (group + 1) * layer.all * tokens
    if stage == policy.pipeline_parallel_size - 1:
        columns = (
            padded_vocab_size(shape.vocab_size, tp_size=policy.tensor_parallel_size) // policy.tensor_parallel_size
        )
        # Of a block: logits in float32, and their gradient in what products take, which in float32 is the same place. And the
        # gradient of a chunk's hidden states, summed in float32.
        rows = min(tokens, LOGIT_ROWS)
        block = min(LOGITS, rows * columns) * (4 if width == 4 else 4 + width)
        logits = block + rows * shape.hidden_size * 4
        largest = max(largest, logits + 2 * tokens * shape.hidden_size * width)
    return round(largest)


def _server_bytes(config: Config, shape: ModelShape, width: int) -> int:
    layout = rollout_layout(config)
    total = sum(prod(shard_shape(entry.kind, shape, 1)) for entry in entries(shape).values() if not entry.is_copy)
    width = 1 if config.weight_sync.quantization else width
    return round(total * width / layout.tp_size)


def print_estimate(found: list[StageMemory], *, gpu_gb: float) -> bool:
    """Print a table, and return True if everything fits."""
    from rich.console import Console
    from rich.table import Table

    table = Table("GB of one GPU", *(f"stage {memory.stage}" for memory in found), title="memory, estimated")
    rows = {
        "weights": "weights", "gradients": "gradients", "optimizer state": "optimizer", "activations": "activations",
        "one layer at work": "working",
    }  # fmt: skip
    for label, field in rows.items():
        table.add_row(label, *(f"{getattr(memory, field) / GB:.1f}" for memory in found))
    table.add_row("CUDA and NCCL", *(f"{CONTEXT_BYTES / GB:.1f}" for _ in found), end_section=True)
    table.add_row("while updating", *(f"{memory.updating / GB:.1f}" for memory in found))
    if found[0].server:
        table.add_row("while sampling, without cache", *(f"{memory.sampling / GB:.1f}" for memory in found))
        free = [gpu_gb - memory.sampling / GB for memory in found]
        table.add_row("left for the server's cache", *(f"{left:.1f}" for left in free))
    console = Console()
    console.print(table)
    fullest = max(max(memory.updating, memory.sampling if memory.server else 0) for memory in found) / GB
    fits = fullest <= gpu_gb
    console.print(f"{'fits' if fits else 'does not fit'}: {fullest:.1f} of {gpu_gb:g} GB on the fullest GPU")
    return fits
