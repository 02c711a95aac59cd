"""Megatron-Core on CPU and gloo, and its checkpoints anywhere. The order matters: see ``apply_cpu``."""

from __future__ import annotations

import importlib
from types import ModuleType

# Everything a training or checkpointing process uses. ``device`` reaches only modules that are loaded when it runs, so
# those that Megatron would import later, from inside a function, are named too.
_MODULES = (
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel",
    "megatron.core.rerun_state_machine",
    "megatron.core.tensor_parallel.data",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.torch_norm",
)


def apply_everywhere() -> list[str]:
    """Apply what a GPU machine needs too: local layers and torch's Adam where Transformer Engine is missing, checkpoints that
    leave no process behind and fail on all ranks alike. Nothing here changes what Transformer Engine's layers do."""
    from . import checkpoint, checkpoint_errors, latent, moe, norm, optimizer

    return _apply(norm, moe, latent, optimizer, checkpoint, checkpoint_errors)


def apply_cpu() -> list[str]:
    """Import Megatron-Core without its compiler, then apply what CPU and gloo need. Returns the topics in order."""
    from . import checkpoint_memory, collectives, device, jit, rng

    with jit.without_compiler():
        for module in _MODULES:
            importlib.import_module(module)
    # ``rng`` adds to the view of torch.cuda that ``device`` hands out; the others are independent of each other.
    return ["jit", *_apply(device, rng, collectives, checkpoint_memory)]


def _apply(*topics: ModuleType) -> list[str]:
    for topic in topics:
        topic.apply()
    return [topic.__name__.rpartition(".")[2] for topic in topics]
