"""The layouts of a run's trainer and servers, where their ranks are, and what servers hold, from the config."""

from __future__ import annotations

from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.weight_sync.fp8_format import Fp8Format
from megatron_rl.weight_sync.pieces import ServedForm, TrainingLayout
from megatron_rl.weight_sync.places import GpuPlace, Places
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
    ours = servers.num_per_node * config.trainer.num_nodes // servers.nodes_per_server
    count = len(servers.urls) if servers.urls is not None else ours
    return RolloutLayout(count, int(passed.get("tp_size", 1)), int(passed.get("ep_size", 1)))


def places_of(config: Config, layout: RolloutLayout, *, is_cpu: bool) -> Places:
    """Return where the ranks of trainer and servers run.

    Args:
        config: of the run.
        layout: of the servers.
        is_cpu: no GPU is used.
    """
    trainer, servers = config.trainer, config.rollout.servers

    def place(node: int, gpu: int) -> GpuPlace:
        return GpuPlace(node, None if is_cpu else gpu)

    ranks = tuple(place(*divmod(rank, trainer.devices)) for rank in range(trainer.num_nodes * trainer.devices))
    receivers = [divmod(number, layout.tp_size) for number in range(layout.num_ranks)]
    if servers.urls is not None:  # may share a machine with us, but we do not know it
        return Places(ranks, tuple(GpuPlace(trainer.num_nodes + server) for server, _ in receivers))
    first = trainer.devices if servers.placement == "separate" else 0
    # Several servers on one node, or one over several; of its pipeline stages, which follow each other, the first.
    size, stages = servers.nodes_per_server, config.rollout.gpus_per_server // layout.tp_size
    per_node = layout.tp_size // max(1, size // stages)
    places = []
    for server, tp_rank in receivers:
        group, index = divmod(server, servers.num_per_node)
        further, gpu = divmod(tp_rank, per_node)
        places.append(place(group * size + further, first + index * config.rollout.gpus_per_server + gpu))
    return Places(ranks, tuple(places))


def served_form(config: Config) -> ServedForm:
    """Return the dtypes of the servers' parameters."""
    return ServedForm("bfloat16" if config.trainer.precision == "bf16" else "float32", fp8_format(config))


def fp8_format(config: Config) -> Fp8Format | None:
    """Return how servers get their linear layers; None means as trained."""
    match config.weight_sync.quantization:
        case "fp8_block":
            return Fp8Format("block", config.weight_sync.power_of_two_scales)
        case "fp8_tensor":
            return Fp8Format("tensor", config.weight_sync.power_of_two_scales)
        case _:
            return None
