"""Construction of the rollout engine that a config names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_rl import plugins
from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.parallel.agree import all_ranks_agree
from megatron_rl.rollout.engine import RolloutEngine, ServedModel
from megatron_rl.rollout.recorded import RecordedEngine, RecordingEngine
from megatron_rl.rollout.sglang.flags import check_kv_pool
from megatron_rl.rollout.transformers_engine import TransformersEngine
from megatron_rl.scoring.scorer import Scorer


class EngineBuilder(Protocol):
    """A function or class that makes an engine; ``rollout.engine: package.module:NAME`` names one from outside."""

    def __call__(
        self, config: Config, model: ServedModel, *, device: torch.device, cpu_group: dist.ProcessGroup
    ) -> RolloutEngine:
        """Start the engine; every rank calls. Arguments as ``build_engine``."""
        ...


def build_engine(
    config: Config, model: ServedModel, *, device: torch.device, cpu_group: dist.ProcessGroup
) -> RolloutEngine:
    """Start the engine of a run; a collective.

    Args:
        config: of the run.
        model: what the engine generates from.
        device: of this rank.
        cpu_group: all ranks, over gloo.

    Raises:
        UserError: ``rollout.engine`` names no engine, or what it names cannot be called as an ``EngineBuilder``.
    """
    name = config.rollout.engine
    with all_ranks_agree(cpu_group):  # a module from outside may fail on one machine alone
        build: EngineBuilder = plugins.find(name, BUILDERS, field="rollout.engine", what="an engine")
        plugins.check_call(build, name, ("config", "model"), ("device", "cpu_group"), field="rollout.engine")
    engine = build(config, model, device=device, cpu_group=cpu_group)
    if not isinstance(engine, RolloutEngine):
        raise UserError(
            "rollout.engine",
            name,
            f"built {plugins.kind_of(engine)}, which is not an engine",
            "give it the methods of megatron_rl.rollout.engine.RolloutEngine",
        )
    if not config.rollout.record or isinstance(engine, RecordedEngine):
        return engine
    agree = partial(all_ranks_agree, cpu_group)
    is_writer = dist.get_rank(cpu_group) == 0
    return RecordingEngine(engine, config.exp_manager.run_dir / "rollouts", is_writer=is_writer, agree=agree)


def build_scorer(config: Config, tokenizer: Any, *, cpu_group: dist.ProcessGroup) -> Scorer:
    """Start the scorer of a run; a collective.

    Raises:
        UserError: ``data.task`` or ``data.reward`` names nothing that judges; on all ranks.
    """
    data = config.data
    return Scorer(
        [data.task],
        tokenizer,
        num_workers=data.num_scoring_workers,
        timeout_s=data.scoring_timeout_s,
        cpu_group=cpu_group,
        reward=data.reward,
        reward_kwargs=data.reward_kwargs,
    )


def _recorded(
    config: Config, model: ServedModel, *, device: torch.device, cpu_group: dist.ProcessGroup
) -> RolloutEngine:
    assert config.rollout.recorded_dir is not None
    return RecordedEngine(Path(config.rollout.recorded_dir))


def _sglang(config: Config, model: ServedModel, *, device: torch.device, cpu_group: dist.ProcessGroup) -> RolloutEngine:
    from megatron_rl.rollout.sglang.engine import SGLangEngine  # needs aiohttp

    # A request that never fits a server's cache is found before the servers are started.
    check_kv_pool(config.rollout.sglang_cfg, is_cpu=device.type == "cpu", longest_request=model.longest_request)
    return SGLangEngine(config, model, device=device, cpu_group=cpu_group)


def _transformers(
    config: Config, model: ServedModel, *, device: torch.device, cpu_group: dist.ProcessGroup
) -> RolloutEngine:
    return TransformersEngine(
        model.path,
        dtype=model.dtype,
        device=device,
        stop_ids=model.stop_ids,
        pad_id=model.pad_id,
        max_batch_size=config.rollout.max_batch_size,
        cpu_group=cpu_group,
    )


BUILDERS: dict[str, EngineBuilder] = {"transformers": _transformers, "sglang": _sglang, "recorded": _recorded}
