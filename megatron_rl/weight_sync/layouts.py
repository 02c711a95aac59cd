"""The training and the rollout layout of a run, from its config."""

from __future__ import annotations

from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.weight_sync.plan import TrainingLayout
from megatron_rl.weight_sync.served import RolloutLayout


def training_layout(config: Config, shape: ModelShape) -> TrainingLayout:
    """Return the layout of the trainer."""
    policy = config.policy
    return TrainingLayout(
        tp_size=policy.tensor_parallel_size,
        pp_size=policy.pipeline_parallel_size,
        dp_size=config.data_parallel_size * policy.context_parallel_size,
        vpp_size=policy.virtual_pipeline_size,
        ep_size=policy.expert_parallel_size if shape.num_experts else 1,
        etp_size=policy.megatron_cfg.get("expert_tensor_parallel_size"),
    )


def rollout_layout(config: Config) -> RolloutLayout:
    """Return the layout of the servers."""
    servers, passed = config.rollout.servers, config.rollout.sglang_cfg
    count = len(servers.urls) if servers.urls is not None else servers.num_per_node * config.trainer.num_nodes
    return RolloutLayout(count, int(passed.get("tp_size", 1)), int(passed.get("ep_size", 1)))
