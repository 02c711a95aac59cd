"""Names of the upstream dataclass fields that a config may pass through, read from the source text without importing it."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from megatron_rl.errors import UserError

TRANSFORMER = (
    ("transformer/transformer_config.py", "TransformerConfig"),
    ("model_parallel_config.py", "ModelParallelConfig"),
)
DDP = (("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),)
OPTIMIZER = (("optimizer/optimizer_config.py", "OptimizerConfig"),)

_SHAPE = "comes from the model's config.json"
_PRECISION = "follows trainer.precision"
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
        ),
        _SHAPE,
    ),
    **dict.fromkeys(
        ("params_dtype", "pipeline_dtype", "bf16", "fp16", "autocast_dtype", "enable_autocast"), _PRECISION
    ),
    "calculate_per_token_loss": _EXACTNESS,
    "layernorm_zero_centered_gamma": "is not how Hugging Face stores norms",
    "variable_seq_lengths": "is fixed: packed micro-batches differ in length",
}
DDP_OWNED: dict[str, str] = {
    "average_in_collective": _EXACTNESS,
    "use_distributed_optimizer": "is fixed: the distributed optimizer is always used",
}
OPTIMIZER_OWNED: dict[str, str] = {
    **dict.fromkeys(
        ("optimizer", "lr", "min_lr", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps"),
        "has its own field in policy.optim",
    ),
    **dict.fromkeys(("bf16", "fp16", "params_dtype"), _PRECISION),
    "use_distributed_optimizer": "is fixed: the distributed optimizer is always used",
}


@cache
def _megatron_core_dir() -> Path:
    """Folder of the installed megatron.core; ``megatron`` is a namespace package, so finding it runs no code."""
    spec = importlib.util.find_spec("megatron")
    for location in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        if (folder := Path(location) / "core").is_dir():
            return folder
    raise UserError("megatron-core", None, "is not installed", "pip install -r requirements/cpu.txt (or gpu.txt)")


@cache
def field_names(source: str, class_name: str) -> frozenset[str]:
    """Annotated fields of one class of megatron.core.

    Args:
        source: file inside ``megatron/core``.
        class_name: the dataclass in it.

    Raises:
        LookupError: the class is not there, so this megatron-core is not one that we know.
    """
    for node in ast.walk(ast.parse((_megatron_core_dir() / source).read_text())):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return frozenset(
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            )
    raise LookupError(f"megatron.core has no {class_name} in {source}")


def nearest(name: str, names: Iterable[str]) -> str:
    """A fix sentence with the closest valid names."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?".rstrip("?") if close else "remove it"


def check_names(
    section: str, given: Mapping[str, object], sources: Iterable[tuple[str, str]], *, owned: Mapping[str, str]
) -> None:
    """Refuse pass-through names that upstream does not have, and those that another part of the config decides.

    Raises:
        UserError: naming the field, with the nearest upstream name.
    """
    if not given:
        return
    known = frozenset().union(*(field_names(source, name) for source, name in sources))
    for name, value in given.items():
        if name in owned:
            raise UserError(f"{section}.{name}", value, owned[name], f"remove {section}.{name}")
        if name not in known:
            classes = " or ".join(name for _, name in sources)
            raise UserError(
                f"{section}.{name}",
                value,
                f"is not a field of megatron-core's {classes}",
                nearest(name, known - set(owned)),
            )
