"""Megatron's optimizer, its schedule and its gradient buffers, from the settings of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.config.installed import has_transformer_engine
from megatron_rl.config.policy import OptimConfig
from megatron_rl.errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}
"""Names in ``optimizer_cfg`` -> types; Megatron writes FP8 as uint8."""
GROUP_FIELDS = {"betas": "adam_beta1 and adam_beta2", "eps": "adam_eps"}
"""Settings that only the optimizer's parameter groups hold: Megatron's name -> ours, under ``policy.optim``."""
KEPT_IN_GROUPS = ("max_lr", "min_lr", "start_wd", "end_wd", *GROUP_FIELDS)
"""Settings of a parameter group that a checkpoint would overwrite."""
_SCHEDULE_FIELDS = {
    "max_lr": "lr",
    "min_lr": "min_lr",
    "start_wd": "weight_decay",
    "lr_decay_style": "sched.name",
    "lr_warmup_steps": "sched.warmup_updates",
    "lr_decay_steps": "sched.decay_updates",
}
"""Settings in the state of Megatron's scheduler: Megatron's name -> ours, under ``policy.optim``."""
_NO_DECAY = 1_000_000_000
"""``decay_updates: null`` as Megatron takes it: a number of updates that no run reaches."""


def check_optimizer(optim: OptimConfig, device: torch.device) -> None:
    """Refuse options of Megatron's optimizer that need a GPU or Transformer Engine where there is none.

    Raises:
        UserError: naming the setting.
    """
    passed, is_gpu = optim.optimizer_cfg, device.type == "cuda"
    for field, can_run, rule in (
        ("optimizer_cpu_offload", is_gpu, "moves what is on a GPU; this run has none"),
        ("use_precision_aware_optimizer", is_gpu and has_transformer_engine(), "needs Transformer Engine on a GPU"),
    ):
        if passed.get(field) and not can_run:
            raise UserError(f"policy.optim.optimizer_cfg.{field}", True, rule, "leave it out")


def ddp_config(settings: Mapping[str, Any]) -> DistributedDataParallelConfig:
    """Build the config of Megatron's gradient buffers; ``settings`` win over our defaults."""
    return DistributedDataParallelConfig(
        **({"grad_reduce_in_fp32": True, "use_distributed_optimizer": True} | dict(settings))
    )


def optimizer_config(optim: OptimConfig, megatron_config: TransformerConfig) -> OptimizerConfig:
    """Build the config of Megatron's optimizer for a model of the given config."""
    settings = {
        "optimizer": optim.name,
        "lr": optim.lr,
        "min_lr": optim.min_lr,
        "weight_decay": optim.weight_decay,
        "clip_grad": optim.clip_grad,
        "adam_beta1": optim.adam_beta1,
        "adam_beta2": optim.adam_beta2,
        "adam_eps": optim.adam_eps,
        "bf16": megatron_config.bf16,
        "params_dtype": megatron_config.params_dtype,
        "use_distributed_optimizer": True,
    }
    known = {field.name for field in fields(OptimizerConfig)}
    passed = {name: _torch_dtype(name, value) for name, value in optim.optimizer_cfg.items()}
    return OptimizerConfig(**({k: v for k, v in settings.items() if k in known} | passed))


def build_scheduler(optimizer: Any, optim: OptimConfig) -> OptimizerParamScheduler:
    """Build the schedule of learning rate and weight decay, in updates."""
    sched = optim.sched
    warmup, decay = sched.num_warmup_updates, None if sched.name == "constant" else sched.decay_updates
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if warmup else optim.lr,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay or max(warmup + 1, _NO_DECAY),
        lr_decay_style=sched.name,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def set_schedule(scheduler: OptimizerParamScheduler, num_updates: int) -> None:
    """Set the rates of the next update, given the number of updates done."""
    scheduler.num_steps = 0
    # Update i runs at point i of the schedule. Megatron's own loop would run it at i - 1, and the first update of a
    # warm-up would then have rate 0 and change nothing.
    scheduler.step(num_updates + 1)


def changed_settings(
    saved: Mapping[str, Any], now: Mapping[str, Any], saved_group: Mapping[str, Any], group: Mapping[str, Any]
) -> list[str]:
    """List the settings that differ from a checkpoint's, as ``policy.optim.lr 0.001 -> 0.0005``.

    Args:
        saved: the scheduler's state in the checkpoint.
        now: the scheduler's state in this run.
        saved_group: a parameter group with the checkpoint's settings.
        group: the settings that this run has for it.
    """
    pairs = [(name, saved[key], now[key]) for key, name in _SCHEDULE_FIELDS.items()]
    pairs += [(name, saved_group[key], group[key]) for key, name in GROUP_FIELDS.items() if key in group]
    return [
        f"policy.optim.{name} {_shown(old)} -> {_shown(new)}" for name, old, new in pairs if _shown(old) != _shown(new)
    ]


def _torch_dtype(field: str, value: Any) -> Any:
    """Return the torch type for a dtype field (YAML has names: ``exp_avg_dtype: bf16``), other values as they are."""
    return DTYPES[value] if field.endswith("_dtype") else value


def _shown(setting: Any) -> str:
    """Format a setting as in the config; a checkpoint may give back a tuple for a list."""
    return "null" if setting == _NO_DECAY else str(list(setting) if isinstance(setting, tuple) else setting)
