"""Publish to an engine: gather each tensor, hand it over, forget it."""

from __future__ import annotations

from megatron_rl.model.step import Policy
from megatron_rl.model.weights import iterate_hf_tensors
from megatron_rl.rollout.engine import RolloutEngine


def publish(policy: Policy, engine: RolloutEngine, *, version: int) -> None:
    """Give the engine the policy's current weights. A collective.

    Args:
        policy: the trained model.
        engine: in process, or servers.
        version: publish counter; completions carry it from now on.
    """
    with policy.timer("weight_sync"):
        engine.update_weights(lambda: iterate_hf_tensors(policy.chunks, policy.shape, policy.groups), version)
