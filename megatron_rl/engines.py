"""The rollout engine that a config asks for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.inputs import Inputs
from megatron_rl.launch.rank import Runtime
from megatron_rl.parallel.agree import all_ranks_agree
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.recorded import RecordedEngine, RecordingEngine
from megatron_rl.rollout.sglang.flags import check_kv_pool
from megatron_rl.rollout.transformers_engine import TransformersEngine
from megatron_rl.weight_sync.publish import served_overrides


def build_engine(config: Config, inputs: Inputs, groups: Groups, runtime: Runtime) -> RolloutEngine:
    """Start it; a collective."""
    if config.rollout.recorded_dir is not None:
        return RecordedEngine(Path(config.rollout.recorded_dir))
    build = _sglang if config.rollout.engine == "sglang" else _transformers
    engine = build(config, inputs, groups, runtime)
    if not config.rollout.record:
        return engine
    agree = partial(all_ranks_agree, groups.cpu_group)
    return RecordingEngine(engine, config.exp_manager.run_dir / "rollouts", is_writer=runtime.rank == 0, agree=agree)


def _sglang(config: Config, inputs: Inputs, groups: Groups, runtime: Runtime) -> RolloutEngine:
    from megatron_rl.rollout.sglang.driver import ServedModel  # needs aiohttp
    from megatron_rl.rollout.sglang.engine import SGLangEngine

    # A request that never fits a server's cache is found before the servers are started.
    is_cpu = runtime.device.type == "cpu"
    check_kv_pool(config.rollout.sglang_cfg, is_cpu=is_cpu, longest_request=inputs.longest_request)
    served = ServedModel(
        Path(config.policy.model_path),
        inputs.shape,
        _dtype(config),
        tuple(inputs.stop_ids),
        records_experts=config.policy.router_replay,
        overrides=served_overrides(config, inputs.shape),
    )
    return SGLangEngine(config, served, device=runtime.device, cpu_group=groups.cpu_group)


def _transformers(config: Config, inputs: Inputs, groups: Groups, runtime: Runtime) -> RolloutEngine:
    pad_id = inputs.tokenizer.pad_token_id
    return TransformersEngine(
        Path(config.policy.model_path),
        dtype=_dtype(config),
        device=runtime.device,
        stop_ids=inputs.stop_ids,
        pad_id=inputs.stop_ids[0] if pad_id is None else pad_id,
        max_batch_size=config.rollout.max_batch_size,
        cpu_group=groups.cpu_group,
    )


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
