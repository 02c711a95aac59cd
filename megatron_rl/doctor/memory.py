"""``megatron-rl plan memory CONFIG``: estimate what one GPU of each pipeline stage will hold (docs/memory.md).

Weights, gradients and optimizer state are counted parameter by parameter, from the table of the model and the layout: exact,
padding of buffers apart. Activations are estimated from the tensors that Transformer Engine's layers keep for backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from math import prod
from typing import Any

from megatron_rl.config import Config, read_model_shape
from megatron_rl.config.policy import DTYPE_BYTES
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import padded_vocab_size, shard_shape
from megatron_rl.convert.tables.table import Entry, entries
from megatron_rl.weight_sync.layouts import training_layout
from megatron_rl.weight_sync.pieces import TrainingLayout

GB = 1e9
LOGIT_ROWS, LOGITS = 8192, 1 << 26
"""Tokens of a chunk, and logits that exist at a time: ``parallel.vocab``'s ``CHUNK_TOKENS`` and ``BLOCK_ELEMENTS``. Repeated,
because that module needs torch, and a plan does not; a test holds them together."""
CONTEXT_BYTES = int(1.5 * GB)
"""Bytes that a process takes before any tensor: CUDA's context, buffers of NCCL and cuBLAS."""
SERVER_RESIDUE_BYTES = 3 * GB
"""Bytes that a server keeps when it has released weights and cache: its CUDA context, NCCL's buffers, the workspaces of
attention, and its CUDA graphs, none of which torch_memory_saver covers. Not measured: 2 to 4 GB are reported of others."""
FULL = 0.9
"""Share of a GPU that a plan should not exceed: the rest is for fragments, and for what an estimate misses."""
ROWS = {
    "weights": "weights", "gradients": "gradients", "optimizer state": "optimizer", "activations": "activations",
    "one layer at work": "working", "float32 gradients, while the optimizer steps": "stepping",
    "the engine's model": "engine", "the engine's cache": "engine_cache", "what the server keeps": "residue",
    "the server's weights, while sampling": "server",
}  # fmt: skip
"""Label of a row -> field of ``StageMemory``."""
ALWAYS = ("weights", "gradients", "optimizer", "activations", "working")
"""Fields that are shown where they are 0, too."""
PROMPT_TOKENS = 1024
"""Tokens of the longest prompt where nothing says it: neither ``data.max_prompt_tokens`` nor the problems themselves."""


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
    stepping: int
    """Bytes on top while the optimizer steps: float32 copies of its share of the gradients, where those have 16 bits."""
    engine: int
    """The model of the engine in the trainer's process, whole on every rank and always there; 0 without one."""
    engine_cache: int
    """Keys, values and logits of that engine while it generates."""
    server: int
    """Weights of the rollout server that shares the GPU; 0 if none does."""
    server_share: float | None
    """``mem_fraction_static``: what that server takes for weights and cache, of what it finds free. None: it chooses."""
    offloads: bool
    """True if gradients and optimizer state leave the GPU while rollouts are sampled."""

    @property
    def residue(self) -> int:
        """Bytes that a colocated server keeps all the time."""
        return int(SERVER_RESIDUE_BYTES) if self.server else 0

    @property
    def starting(self) -> int:
        """Bytes when the policy is built or a checkpoint is read: nothing is offloaded, no colocated server has started."""
        return self.weights + self.gradients + self.optimizer + self.engine + CONTEXT_BYTES

    @property
    def updating(self) -> int:
        """Bytes during an update, at its fullest moment; a colocated server has released its memory."""
        return self.starting + self.residue + max(self.activations + self.working, self.stepping)

    @property
    def sampling(self) -> int:
        """Bytes while rollouts are sampled, without a server's KV cache, which gets the rest."""
        kept = 0 if self.offloads else self.gradients + self.optimizer
        return self.weights + kept + self.engine + self.engine_cache + self.server + self.residue + CONTEXT_BYTES

    @property
    def needed(self) -> int:
        """Bytes of the smallest GPU on which this stage updates and samples."""
        least = 0
        if self.server and self.server_share:
            least = round(self.server / self.server_share) - self._beside_the_start
        return max(self.updating, self.sampling, least)

    def server_cache(self, gpu_bytes: float) -> int:
        """Return the bytes of a colocated server's KV cache on a GPU of this size; not above 0 where the server does not start.

        SGLang (kv_cache_configurator.py): what was free before its weights times ``mem_fraction_static``, less the weights.
        """
        room = gpu_bytes - self.sampling
        if self.server_share is not None:
            room = min(room, self.server_share * (gpu_bytes + self._beside_the_start) - self.server)
        return int(room)

    @property
    def _beside_the_start(self) -> int:
        """Bytes, below 0, that a server finds taken when it starts: the trainer's, and its own context."""
        return self.server + self.residue - CONTEXT_BYTES - self.sampling


def estimate(config: Config, shape: ModelShape | None = None, *, longest: int | None = None) -> list[StageMemory]:
    """Estimate each pipeline stage.

    Args:
        config: the run's.
        shape: the model's; None reads it.
        longest: tokens of the longest row; None takes them from the config's limits.

    Raises:
        UserError: the model cannot be read, or the layout does not fit it.
    """
    shape = read_model_shape(config) if shape is None else shape
    layout, policy, rollout = training_layout(config, shape), config.policy, config.rollout
    passed = policy.megatron_cfg
    width = 2 if config.trainer.precision == "bf16" else 4
    expert_replicas = max(1, layout.tp_size * layout.dp_size // (layout.expert_tp_size * layout.ep_size))
    server = _server_bytes(config, shape, width) if rollout.is_colocated else 0
    is_in_process = rollout.engine == "transformers" and (config.trainer.stage == "rl" or config.eval.is_used)
    gradient = 4 if policy.ddp_cfg.get("grad_reduce_in_fp32", True) else width
    # The precision-aware optimizer reads the gradients where they are.
    is_copied = gradient == 2 and not policy.optim.optimizer_cfg.get("use_precision_aware_optimizer")
    found = []
    for stage, count in enumerate(_counts(shape, layout)):
        share = count["dense"] / layout.dp_size + count["expert"] / expert_replicas
        total = count["dense"] + count["expert"]
        found.append(
            StageMemory(
                stage=stage,
                num_parameters=total,
                weights=_weight_bytes(passed, total, count["linear"], width),
                gradients=total * gradient,
                optimizer=round(_optimizer_bytes(config) * share),
                activations=_activation_bytes(config, shape, stage, width),
                working=_working_bytes(config, shape, stage, width),
                stepping=round(4 * share) if is_copied else 0,
                engine=_model_size(shape) * width if is_in_process else 0,
                engine_cache=_engine_cache(config, shape, width, longest) if is_in_process else 0,
                server=server,
                server_share=rollout.sglang_cfg.get("mem_fraction_static"),
                offloads=config.offloads_during_rollouts,
            )
        )
    return found


@cache
def _counts(shape: ModelShape, layout: TrainingLayout) -> list[dict[str, int]]:
    """Count the parameters of the first rank of each pipeline stage: ``dense``, ``expert``, and of both the ``linear`` ones."""
    counts = [{"dense": 0, "expert": 0, "linear": 0} for _ in range(layout.pp_size)]
    for entry in entries(shape).values():
        if (entry.is_copy and layout.pp_size == 1) or entry.is_float32:
            continue  # in float32 are the biases of routers alone: a few numbers, without gradient
        stage = layout.stage_of(entry, shape.num_layers)
        _, cut, ranks = layout.shards(entry, shape)[0]
        if 0 not in ranks:  # an expert of other ranks
            continue
        size = prod(shard_shape(entry.kind, shape, cut))
        counts[stage]["dense" if entry.expert is None else "expert"] += size
        counts[stage]["linear"] += size if _is_linear(entry) else 0
    return counts


@cache
def _model_size(shape: ModelShape) -> int:
    """Count the parameters of the whole model."""
    return sum(prod(shard_shape(entry.kind, shape, 1)) for entry in entries(shape).values() if not entry.is_copy)


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
        # Autograd gets an empty gradient of the output layer, whose own is in Megatron's buffer. Not where the embedding is the
        # same tensor on the same stage: there the embedding's gradient is the one.
        stand_in = 0 if shape.tied and policy.pipeline_parallel_size == 1 else columns * shape.hidden_size * width
        largest = max(largest, logits + 2 * tokens * shape.hidden_size * width + stand_in)
    return round(largest)


def _server_bytes(config: Config, shape: ModelShape, width: int) -> int:
    width = 1 if config.weight_sync.quantization else width
    return round(_model_size(shape) * width / config.rollout.gpus_per_server)


def longest_row(config: Config) -> int:
    """Return the tokens of the longest row that an online run may sample, by its limits."""
    return (config.data.max_prompt_tokens or PROMPT_TOKENS) + config.rollout.max_new_tokens


def _engine_cache(config: Config, shape: ModelShape, width: int, longest: int | None) -> int:
    """Return the bytes that the engine in process takes while it generates: a full batch of the longest rows."""
    rows = config.rollout.max_batch_size
    tokens = rows * (longest or longest_row(config))
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    # Key and value of a head. Latent attention caches them for every head.
    head, groups = (
        (2 * shape.head_dim, groups) if shape.latent is None else (shape.head_dim + shape.latent.v_head_dim, heads)
    )
    cache = tokens * shape.num_layers * groups * head * width
    repeated = tokens * heads * head * width  # transformers gives every query head a copy, a layer at a time
    return cache + repeated + 3 * rows * shape.vocab_size * 4  # logits, their softmax and what is drawn from


def print_estimate(found: list[StageMemory], *, gpu_gb: float) -> bool:
    """Print a table, and return True if everything fits."""
    from rich.console import Console
    from rich.table import Table

    table = Table("GB of one GPU", *(f"stage {memory.stage}" for memory in found), title="memory, estimated")

    def row(label: str, values: list[int], *, ends: bool = False) -> None:
        table.add_row(label, *(f"{value / GB:.1f}" for value in values), end_section=ends)

    for label, field in ROWS.items():
        values = [getattr(memory, field) for memory in found]
        if any(values) or field in ALWAYS:
            row(label, values)
    row("CUDA and NCCL", [CONTEXT_BYTES for _ in found], ends=True)
    row("at the start", [memory.starting for memory in found])
    row("while updating", [memory.updating for memory in found])
    if found[0].server:
        row("while sampling, without cache", [memory.sampling for memory in found])
        share = found[0].server_share
        label = (
            "left for the server's cache" if share is None else f"the server's cache, by mem_fraction_static {share:g}"
        )
        row(label, [memory.server_cache(gpu_gb * GB) for memory in found])
    elif found[0].engine:
        row("while sampling", [memory.sampling for memory in found])
    console = Console()
    console.print(table)
    fullest = max(memory.needed for memory in found) / GB
    fits = fullest <= gpu_gb
    console.print(f"{'fits' if fits else 'does not fit'}: {fullest:.1f} of {gpu_gb:g} GB on the fullest GPU")
    if fits and fullest > FULL * gpu_gb:
        console.print(f"tight: above {FULL:.0%}, fragments may fill the rest")
    return fits
