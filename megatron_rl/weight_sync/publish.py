"""Publish to an engine: shards straight to the servers' ranks where these can take them, else tensor by tensor."""

from __future__ import annotations

from urllib.parse import urlsplit

import torch

from megatron_rl.config import Config
from megatron_rl.model.step import Policy
from megatron_rl.model.weights import iterate_hf_tensors, named_parameters
from megatron_rl.rollout.engine import RolloutEngine, ShardSource
from megatron_rl.rollout.sglang.process import own_address
from megatron_rl.weight_sync.layouts import training_layout
from megatron_rl.weight_sync.shards import Meeting, ShardSender


def publish(policy: Policy, engine: RolloutEngine, *, version: int, shards: ShardSource | None = None) -> None:
    """Give the engine the policy's current weights. A collective.

    Args:
        policy: the trained model.
        engine: in process, or servers.
        version: publish counter; completions carry it from now on.
        shards: sends them without making any tensor whole.
    """
    with policy.timer("weight_sync"):
        engine.update_weights(
            lambda: iterate_hf_tensors(policy.chunks, policy.shape, policy.groups), version, shards=shards
        )


def shard_source(config: Config, policy: Policy) -> ShardSender | None:
    """What sends shards to this run's servers; None where the config, or the place of the servers, rules it out.

    A server on the trainer's own GPU cannot be in one NCCL group with it: it gets whole tensors.
    """
    groups, servers = policy.groups, config.rollout.servers
    is_shared_gpu = servers.placement == "colocated" and groups.device.type != "cpu"
    if config.rollout.engine != "sglang" or config.weight_sync.transport == "tensors" or is_shared_gpu:
        return None
    hosts = [str(urlsplit(url).hostname) for url in servers.urls or ()]
    return ShardSender(
        lambda: {name: tensor.detach() for name, tensor in named_parameters(policy.chunks, policy.shape, groups)},
        policy.shape,
        training_layout(config, policy.shape),
        Meeting(
            host=own_address(config.trainer.num_nodes, *hosts),
            device=groups.device,
            timeout_s=config.weight_sync.timeout_s,
            bucket_bytes=config.weight_sync.bucket_bytes,
        ),
        dtype=torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32,
        cpu_group=groups.cpu_group,
    )
