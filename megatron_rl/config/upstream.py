"""Fields of upstream's classes that a config may pass through, and kinds of their values; no upstream code is imported."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from megatron_rl.config.annotations import UpstreamField, ValueKind, read_constants, read_fields
from megatron_rl.config.installed import platform
from megatron_rl.errors import UserError

TRANSFORMER = (
    ("transformer/transformer_config.py", "TransformerConfig"),
    ("model_parallel_config.py", "ModelParallelConfig"),
)
DDP = (("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),)
OPTIMIZER = (("optimizer/optimizer_config.py", "OptimizerConfig"),)

_SHAPE = "comes from the model's config.json"
_PRECISION = "follows trainer.precision"
_SAME_NETWORK = "is fixed at 0: with dropout, log-probs before and after an update would be of different networks"
_STALE_SHARDS = "is fixed at false: weights would be published before ranks have exchanged what the update made of them"
_PREDICTION = "is not supported: layers that predict later tokens are neither loaded nor trained"
_SHARDED_WEIGHTS = "is not supported: weights would be sharded, and loading, publishing and checkpoints know whole ones"
_EXACTNESS = "is fixed: with it off, gradients depend on the data-parallel layout"
TRANSFORMER_OWNED: dict[str, str] = {
    **dict.fromkeys(
        (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "ffn_hidden_size",
            "kv_channels",
            "normalization",
            "layernorm_epsilon",
            "activation_func",
            "gated_linear_unit",
            "add_bias_linear",
            "add_qkv_bias",
            "qk_layernorm",
            "rotary_interleaved",
            "activation_func_clamp_value",
            "glu_linear_offset",
            "num_moe_experts",
            "moe_ffn_hidden_size",
            "moe_router_topk",
            "moe_router_pre_softmax",
            "moe_layer_freq",
            "moe_router_topk_limited_devices",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_topk_scaling_factor",
            "moe_router_score_function",
            "moe_router_enable_expert_bias",
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
            "moe_latent_size",
            "experimental_attention_variant",
            "multi_latent_attention",
            "softmax_scale",
            "window_size",
            "window_attn_skip_freq",
            "no_rope_freq",
            "mrope_section",
            "qk_l2_norm",
            "attention_output_gate",
            "apply_residual_connection_post_layernorm",
            "linear_attention_freq",
        ),
        _SHAPE,
    ),
    **dict.fromkeys(
        (
            "mtp_num_layers",
            "mtp_loss_scaling_factor",
            "mtp_use_repeated_layer",
            "mtp_detach_heads",
            "mtp_hybrid_override_pattern",
            "mtp_standalone",
        ),
        _PREDICTION,
    ),
    "softmax_type": "is fixed at vanilla: no checkpoint has learned sinks, and Megatron's gradient norm leaves some out",
    "hybrid_context_parallel": "is not supported: which ranks share a sequence is fixed when the model is built",
    "perform_initialization": "is fixed at true: Megatron marks the parts of a weight while it fills them, and leaves those "
    "without a mark out of the gradient norm",
    **dict.fromkeys(
        ("params_dtype", "pipeline_dtype", "bf16", "fp16", "autocast_dtype", "enable_autocast"), _PRECISION
    ),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), _SAME_NETWORK),
    "calculate_per_token_loss": _EXACTNESS,
    **dict.fromkeys(
        ("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_drop_policy"),
        "drops tokens by what else is in their pack",
    ),
    **dict.fromkeys(
        ("moe_input_jitter_eps", "moe_router_force_load_balancing"),
        "makes routing random: log-probs before and after an update would be of different networks",
    ),
    "moe_enable_routing_replay": "is policy.router_replay",
    "use_te_activation_func": "is fixed at false: bias_activation_fusion is the fused kernel",
    **dict.fromkeys(
        ("fine_grained_activation_offloading", "offload_modules"),
        "is not supported: its pool of pinned memory keeps a buffer for every length of pack that it has seen",
    ),
    "cpu_offloading_retain_pinned_cpu_buffers": "needs packs of one length",
    **dict.fromkeys(
        ("cpu_offloading_weights", "cpu_offloading_double_buffering"), "does nothing in today's Transformer Engine"
    ),
    "layernorm_zero_centered_gamma": "is not how Hugging Face stores norms",
    "variable_seq_lengths": "is fixed: packed micro-batches differ in length",
    **dict.fromkeys(
        ("overlap_p2p_comm", "batch_p2p_comm"), "is fixed: other values give wrong gradients under virtual pipelining"
    ),
}
DDP_OWNED: dict[str, str] = {
    "average_in_collective": _EXACTNESS,
    # Megatron then leaves the all-gather to the next forward pass of training, and publish, export and evaluation come first.
    "overlap_param_gather": _STALE_SHARDS,
    "use_distributed_optimizer": "is fixed: the distributed optimizer is always used",
    **dict.fromkeys(("use_megatron_fsdp", "use_custom_fsdp"), _SHARDED_WEIGHTS),
}
OPTIMIZER_OWNED: dict[str, str] = {
    **dict.fromkeys(
        ("optimizer", "lr", "min_lr", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps"),
        "has its own field in policy.optim",
    ),
    **dict.fromkeys(("bf16", "fp16", "params_dtype"), _PRECISION),
    **dict.fromkeys(("overlap_param_gather", "overlap_param_gather_with_optimizer_step"), _STALE_SHARDS),
    "use_distributed_optimizer": "is fixed: the distributed optimizer is always used",
}
SGLANG_OWNED: dict[str, str] = {
    "model_path": "comes from policy.model_path",
    **dict.fromkeys(
        ("host", "port", "nccl_port"), "is chosen per server; rollout.servers.base_port sets the first port"
    ),
    **dict.fromkeys(("nnodes", "node_rank", "dist_init_addr"), "follows rollout.servers.nodes_per_server"),
    "dp_size": "is fixed: start more servers with rollout.servers.num_per_node",
    "weight_version": "is the publish counter",
    **dict.fromkeys(("api_key", "admin_api_key"), "is drawn at random for every run"),
    **dict.fromkeys(
        ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_keyfile_password", "enable_ssl_refresh"),
        "is not supported: the servers of a run speak plain http",
    ),
    "enable_metrics": "is not supported: SGLang's /metrics is open to everybody, also where a server has a key",
    **dict.fromkeys(
        ("grpc_mode", "grpc_port", "smg_grpc_mode", "smg_http_sidecar_port", "sidecar"),
        "is not supported: it opens a port that asks for no key",
    ),
    "kv_events_config": "is not supported: events go out by a port that asks for no key",
    **dict.fromkeys(
        ("enable_dp_attention", "attn_dp_size", "dwdp_size"),
        "is not supported: such a server's queues are TCP ports without a key, in place of files",
    ),
    "tokenizer_worker_num": "is fixed at 1: with more, SGLang takes no key and does not start",
    "base_gpu_id": "follows rollout.servers.placement",
    "enable_memory_saver": "follows rollout.servers.placement",
    "enable_return_routed_experts": "follows policy.router_replay",
}
SGLANG_SIZES = frozenset({"tp_size", "pp_size", "ep_size", "attn_cp_size", "dcp_size", "moe_dp_size"})
"""Numbers of ranks of one server. SGLang gives each a whole number, and looks at some of them only while it starts."""
SGLANG_OPTIONAL_SIZES = frozenset(
    {"moe_dense_tp_size", "shared_experts_tp_size", "elastic_ep_initial_size", "max_ep_size"}
)
"""Numbers of ranks that may be null as well."""


@cache
def _megatron_core_dir() -> Path:
    """Folder of the installed megatron.core; ``megatron`` is a namespace package, so finding it runs no code."""
    spec = importlib.util.find_spec("megatron")
    for location in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        if (folder := Path(location) / "core").is_dir():
            return folder
    raise UserError("megatron-core", None, "is not installed", "pip install -r requirements/cpu.txt (or gpu.txt)")


@cache
def class_fields(source: str, class_name: str) -> dict[str, UpstreamField]:
    """Read the fields of one class of megatron.core.

    Args:
        source: file inside ``megatron/core``.
        class_name: the dataclass in it.

    Raises:
        LookupError: the class is not there, so this megatron-core is not one that we know.
    """
    found = read_fields((_megatron_core_dir() / source).read_text(), class_name=class_name)
    if not found:
        raise LookupError(f"megatron.core has no {class_name} in {source}")
    return found


@cache
def sglang_fields() -> dict[str, UpstreamField] | None:
    """Read the fields of the installed SGLang's server arguments; None where it is not installed, as on a laptop that plans."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "srt"
    # Since 0.5.23 the fields stand in one file a namespace; before, in the class ServerArgs itself.
    files = [*sorted((folder / "arg_groups" / "fields").glob("*.py")), folder / "server_args.py"]
    choices = read_constants(folder / "arg_groups" / "choices.py")
    found: dict[str, UpstreamField] = {}
    for file in files:
        found |= read_fields(file.read_text(), constants=choices)
    return found


def check_sglang(given: Mapping[str, object]) -> None:
    """Check ``rollout.sglang_cfg``: names of SGLang's server that are not decided elsewhere, and values of their kinds.

    Without SGLang only what is decided elsewhere and the sizes are checked. A start calls ``check_sglang_is_here``.

    Raises:
        UserError: naming the field.
    """
    for name, value in given.items():
        field = f"rollout.sglang_cfg.{name}"
        if name.startswith("speculative_") and value is not None:
            rule = "is not supported: weights come from the trainer, which has none for a draft model: it would stay random"
            raise UserError(field, value, rule, f"remove {field}")
        if name in SGLANG_OWNED:
            shown = None if name.endswith(("key", "password")) else value
            raise UserError(field, shown, SGLANG_OWNED[name], f"remove {field}")
        if (known := sglang_fields()) is not None:
            _check_sglang_field(field, name, value, known)
        is_size = name in SGLANG_SIZES or (name in SGLANG_OPTIONAL_SIZES and value is not None)
        if is_size and (not isinstance(value, int) or value < 1):
            raise UserError(field, value, "must be a whole number of at least 1", "correct it, or leave it out")


def _check_sglang_field(field: str, name: str, value: object, known: Mapping[str, UpstreamField]) -> None:
    if name not in known:
        longer = [other for other, found in known.items() if name in found.aliases]
        raise UserError(field, value, "is not an argument of SGLang's server", nearest(name, longer or known))
    # Values travel as words of a command line; null gives none.
    forms = [value, [value], *([str(value)] if type(value) in (int, float) else [])]
    if value is not None and not any(map(known[name].kind.fits, forms)):
        raise _not_of_kind(field, value, known[name].kind)


def unchecked_note(given: Mapping[str, object]) -> str | None:
    """Say that ``rollout.sglang_cfg`` was read without SGLang; None where SGLang is installed or nothing is given."""
    if not given or sglang_fields() is not None:
        return None
    return (
        f"SGLang is not installed here, so names and values in rollout.sglang_cfg were not checked: {', '.join(given)}"
    )


def check_sglang_is_here(*, is_colocated: bool) -> None:
    """Check that this environment can start servers.

    Args:
        is_colocated: True where servers share the trainer's GPUs, so that servers of another environment do not help.

    Raises:
        UserError: SGLang is not installed.
    """
    if sglang_fields() is None:
        other = "" if is_colocated else ", or give rollout.servers.urls"
        fix = f"make sglang PLATFORM={platform()}{other}"
        raise UserError("rollout.engine", "sglang", "needs SGLang, which is not installed here", fix)


def nearest(name: str, names: Iterable[str]) -> str:
    """A fix sentence with the closest valid names: those that go on where ``name`` ends, else those spelt alike."""
    names = list(names)
    close = [other for other in names if other.startswith(f"{name}_")][:3]
    close = close or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "remove it"


def check_fields(
    section: str, given: Mapping[str, object], sources: Iterable[tuple[str, str]], *, owned: Mapping[str, str]
) -> None:
    """Check a pass-through section: names that upstream has and no other part of the config decides, and values of their kinds.

    Raises:
        UserError: naming the field.
    """
    if not given:
        return
    known: dict[str, UpstreamField] = {}
    for source, class_name in reversed(list(sources)):  # the derived class comes first
        known |= class_fields(source, class_name)
    for name, value in given.items():
        field = f"{section}.{name}"
        if name in owned:
            raise UserError(field, value, owned[name], f"remove {field}")
        if name not in known:
            classes = " or ".join(name for _, name in sources)
            rule = f"is not a field of megatron-core's {classes}"
            raise UserError(field, value, rule, nearest(name, known.keys() - owned.keys()))
        if not known[name].kind.fits(value):
            raise _not_of_kind(field, value, known[name].kind)


def _not_of_kind(field: str, value: object, kind: ValueKind) -> UserError:
    fix = "correct the value, or leave it out"
    if isinstance(value, str) and kind.fits(_number(value)):
        fix = "give it without quotes; a number from the environment is ${oc.decode:${oc.env:NAME}}"
    return UserError(field, value, f"must be {kind.words}", fix)


def _number(text: str) -> object:
    """Return the number that a text spells, or the text."""
    for read in (int, float):
        with suppress(ValueError):
            return read(text)
    return text
