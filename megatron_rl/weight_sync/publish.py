"""Publish a policy's weights to an engine, version after version, in eight bits where the config says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.table import hf_tensors, plain_name
from megatron_rl.model.trainable import Trainable
from megatron_rl.model.weights import iterate_hf_tensors, named_parameters
from megatron_rl.rollout.engine import RolloutEngine, ServedModel
from megatron_rl.weight_sync.delivery import WeightDelivery, choose_transports
from megatron_rl.weight_sync.fp8_format import quantization_config
from megatron_rl.weight_sync.layouts import fp8_format, rollout_layout
from megatron_rl.weight_sync.quantize import quantized
from megatron_rl.weight_sync.served import check_served


class WeightSync:
    """Publisher of the policy's weights to an engine, version after version. Every method is a collective."""

    def __init__(self, config: Config, policy: Trainable) -> None:
        """Choose the transports; nothing is sent yet.

        Args:
            config: of the run.
            policy: the trained model.
        """
        self._policy, self._format = policy, fp8_format(config)
        transports = choose_transports(
            config, policy.shape, policy.groups, tensors=self._tensors, parameters=lambda: shards_of(policy)
        )
        self._delivery = WeightDelivery(self._tensors, transports)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Figures of the last delivery to servers, as ``weight_sync/<what>``."""
        return self._delivery.metrics

    def publish(self, engine: RolloutEngine, *, version: int) -> None:
        """Give the engine the current weights.

        Args:
            engine: in process, or servers.
            version: publish counter; completions carry it from now on.
        """
        with self._policy.timer("weight_sync"):
            engine.update_weights(self._delivery, version)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        policy = self._policy
        tensors = iterate_hf_tensors(policy.chunks, policy.shape, policy.groups)
        return tensors if self._format is None else quantized(tensors, self._format)


def served_model(
    config: Config, shape: ModelShape, *, stop_ids: Sequence[int], pad_id: int | None, longest_request: int
) -> ServedModel:
    """Return what the engine of a run generates from.

    Args:
        config: of the run.
        shape: of its model.
        stop_ids: end-of-sequence tokens.
        pad_id: of the tokenizer; None takes the first of ``stop_ids``.
        longest_request: tokens of the longest prompt with its response.

    Raises:
        UserError: SGLang could not serve the model so.
    """
    return ServedModel(
        config.policy.model_dir,
        shape,
        torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32,
        tuple(stop_ids),
        pad_id=stop_ids[0] if pad_id is None else pad_id,
        longest_request=longest_request,
        records_experts=config.policy.router_replay,
        overrides=served_overrides(config, shape),
    )


def served_overrides(config: Config, shape: ModelShape) -> dict[str, Any]:
    """Return the fields of config.json that must differ for the servers of a run.

    Raises:
        UserError: SGLang could not serve the model so.
    """
    fmt = fp8_format(config)
    if fmt is None:
        return {}
    if config.rollout.servers.urls is None:
        check_served(shape, fmt, rollout_layout(config))
    return {"quantization_config": quantization_config(hf_tensors(shape), fmt)}


def shards_of(policy: Trainable) -> dict[str, Tensor]:
    """Return this rank's current weights by the table's names; Transformer Engine names fused norms and experts differently."""
    named = named_parameters(policy.chunks, policy.shape, policy.groups)
    return {plain_name(name): tensor.detach() for name, tensor in named}
