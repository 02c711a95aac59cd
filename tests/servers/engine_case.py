"""Engines on their own, for tests that need no training run. Called on forked ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config import load_config
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.rollout.engine import ServedModel
from megatron_rl.rollout.sglang.engine import SGLangEngine
from megatron_rl.rollout.transformers_engine import TransformersEngine
from megatron_rl.weight_sync.delivery import OverHttp, WeightDelivery
from tests.e2e.conftest import Case


def build_engine(case: Case, *urls: str, overrides: Sequence[str] = ()) -> SGLangEngine:
    overrides = case.arguments("rollout.engine=sglang", f"rollout.servers.urls=[{','.join(urls)}]", *overrides)[1:]
    config = load_config(case.arguments()[0], overrides)
    shape = read_shape(case.model)
    served = ServedModel(case.model, shape, torch.float32, tuple(shape.eos_token_ids))
    return SGLangEngine(config, served, device=torch.device("cpu"), cpu_group=dist.group.WORLD)


def build_in_process(case: Case) -> TransformersEngine:
    shape = read_shape(case.model)
    return TransformersEngine(
        case.model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        stop_ids=shape.eos_token_ids,
        pad_id=0,
        max_batch_size=8,
        cpu_group=dist.group.WORLD,
    )


def weights_of(model_path: object) -> WeightDelivery:
    """The checkpoint's own weights, as often as they are asked for."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)

    def weights() -> Iterable[tuple[str, Tensor]]:
        return [(name, parameter.detach()) for name, parameter in model.named_parameters()]

    assert dist.group.WORLD is not None
    return WeightDelivery(weights, [OverHttp(weights, bucket_bytes=2**29, cpu_group=dist.group.WORLD)])
