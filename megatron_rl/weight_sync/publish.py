"""Publish to an engine, the way that the config names: shards, whole tensors (in eight bits, too), or a shared directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.table import hf_tensors, plain_name
from megatron_rl.model.trainable import Trainable
from megatron_rl.model.weights import iterate_hf_tensors, named_parameters
from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json
from megatron_rl.process.network import own_address
from megatron_rl.rollout.engine import CheckpointSource, RolloutEngine, ShardSource
from megatron_rl.weight_sync import disk
from megatron_rl.weight_sync.layouts import rollout_layout, training_layout
from megatron_rl.weight_sync.quantize import Fp8Format, check_served, quantization_config, quantized
from megatron_rl.weight_sync.shards import Meeting, ShardSender


class WeightSync:
    """Gives an engine the policy's weights, version after version. Every method is a collective."""

    def __init__(self, config: Config, policy: Trainable) -> None:
        """Nothing is sent yet.

        Args:
            config: of the run.
            policy: the trained model.
        """
        self._policy, self._format = policy, fp8_format(config)
        self._shards: ShardSource | None = _shard_sender(config, policy)
        self._disk = _Disk(config, policy) if config.weight_sync.transport == "disk" else None

    def publish(self, engine: RolloutEngine, *, version: int) -> None:
        """Give the engine the current weights.

        Args:
            engine: in process, or servers.
            version: publish counter; completions carry it from now on.
        """
        checkpoint: CheckpointSource | None = None
        if (disk := self._disk) is not None:

            def checkpoint() -> str:
                return disk.write(self._tensors(), version)

        with self._policy.timer("weight_sync"):
            engine.update_weights(self._tensors, version, shards=self._shards, checkpoint=checkpoint)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        policy = self._policy
        tensors = iterate_hf_tensors(policy.chunks, policy.shape, policy.groups)
        # Only rank 0 hands tensors over; the others are there for the collectives behind the iterator.
        return tensors if self._format is None or policy.groups.rank != 0 else quantized(tensors, self._format)


def fp8_format(config: Config) -> Fp8Format | None:
    """How servers get their linear layers; None: as trained."""
    match config.weight_sync.quantization:
        case "fp8_block":
            return Fp8Format("block", config.weight_sync.power_of_two_scales)
        case "fp8_tensor":
            return Fp8Format("tensor", config.weight_sync.power_of_two_scales)
        case _:
            return None


def served_overrides(config: Config, shape: ModelShape) -> dict[str, Any]:
    """Fields of config.json that the servers of a run must read otherwise.

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
    """This rank's weights as they are now, by the table's names: Transformer Engine calls fused norms and experts otherwise."""
    named = named_parameters(policy.chunks, policy.shape, policy.groups)
    return {plain_name(name): tensor.detach() for name, tensor in named}


def _shard_sender(config: Config, policy: Trainable) -> ShardSender | None:
    """None where the config rules shards out."""
    groups, servers, sync = policy.groups, config.rollout.servers, config.weight_sync
    is_asked_for = sync.transport in ("auto", "shards") and sync.quantization is None
    if config.rollout.engine != "sglang" or not is_asked_for:
        return None
    if groups.device.type == "cpu":
        backend = "gloo"
    else:
        backend = "ipc" if servers.placement == "colocated" else "nccl"
    hosts = [str(urlsplit(url).hostname) for url in servers.urls or ()]
    return ShardSender(
        lambda: shards_of(policy),
        policy.shape,
        training_layout(config, policy.shape),
        Meeting(
            host=own_address(config.trainer.num_nodes, *hosts),
            backend=backend,
            timeout_s=sync.timeout_s,
            bucket_bytes=sync.bucket_bytes,
        ),
        dtype=torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32,
        cpu_group=groups.cpu_group,
    )


class _Disk:
    """Differences in a shared directory, and beside them the checkpoint that they make; rank 0 does the work."""

    def __init__(self, config: Config, policy: Trainable) -> None:
        sync, self._group = config.weight_sync, policy.groups.cpu_group
        self._directory, self._base = Path(str(sync.directory)).absolute(), Path(config.policy.model_path)
        self._is_writer = policy.groups.rank == 0
        self._publisher = disk.DiskPublisher(self._directory, full_every=sync.full_every)
        self._written: tuple[int, str] | None = None

    def write(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> str:
        """The checkpoint of a version.

        Raises:
            UserError: on all ranks; it cannot be written.
        """
        if self._written is None or self._written[0] != version:
            with all_ranks_agree(self._group):
                try:
                    path = self._write(tensors, version) if self._is_writer else ""
                finally:
                    _consume(tensors)  # the other ranks are in the collectives behind it
            self._written = (version, str(broadcast_json(path, self._group)))
        return self._written[1]

    def _write(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> str:
        target = self._directory / f"served_{version:08d}"
        base = Path(self._written[1]) if self._written is not None else self._base
        self._publisher.publish(tensors, version)
        shutil.rmtree(target, ignore_errors=True)  # of an earlier run
        path = disk.apply(self._directory, base, version, into=target)
        for old in self._directory.glob("served_*"):
            if old not in (path, base):
                shutil.rmtree(old, ignore_errors=True)
        return str(path)


def _consume(tensors: Iterator[tuple[str, Tensor]]) -> None:
    for _ in tensors:
        pass
