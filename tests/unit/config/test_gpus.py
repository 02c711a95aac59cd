"""Rules that hold on GPUs alone: servers share the trainer's evenly, and attention in float32 is not shared out."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.layouts import places_of, rollout_layout

TINY = Path(__file__).parents[2] / "tiny.yaml"
COLOCATED = ("rollout.engine=sglang", "rollout.servers.placement=colocated", "algorithm.num_prompts_per_step=16",
             "policy.train_global_batch_size=64")  # fmt: skip
FP32_CP = ("trainer.precision=fp32", "trainer.devices=2", "policy.megatron_cfg.context_parallel_size=2")


def load(*overrides: str) -> Config:
    return load_config(TINY, ["policy.model_path=m", *overrides])


def shared(devices: int, servers: int, tp: int, *more: str) -> Config:
    sizes = (
        f"trainer.devices={devices}",
        f"rollout.servers.num_per_node={servers}",
        f"rollout.sglang_cfg.tp_size={tp}",
    )
    return load(*COLOCATED, *sizes, "trainer.accelerator=auto", *more)


@pytest.mark.parametrize(
    ("devices", "servers", "tp", "fix"),
    [(8, 3, 2, "set it to 4"), (8, 5, 2, "set it to 4"), (8, 1, 1, "set it to 8"), (8, 2, 3, "divisor of 8")],
)
def test_servers_that_share_gpus_unevenly_are_refused(devices: int, servers: int, tp: int, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        shared(devices, servers, tp)
    error = caught.value
    assert (error.field, error.value) == ("rollout.servers.num_per_node", servers)
    assert f"tp_size = {tp}, must be trainer.devices = {devices}" in error.rule and fix in error.fix


def test_servers_that_share_gpus_evenly_pass_and_so_do_those_that_share_none() -> None:
    for devices, servers, tp in ((8, 4, 2), (8, 8, 1), (8, 1, 8), (1, 1, 1)):
        assert shared(devices, servers, tp).rollout.is_colocated
    assert shared(8, 2, 2, "rollout.sglang_cfg.pp_size=2").rollout.gpus_per_server == 4
    shared(8, 3, 2, "rollout.servers.placement=separate")
    shared(8, 3, 2, "trainer.accelerator=cpu")


def test_float32_over_context_parallel_ranks_is_refused_where_transformer_engine_attends() -> None:
    with pytest.raises(UserError) as caught:
        load(*FP32_CP, "trainer.accelerator=gpu")
    assert (caught.value.field, caught.value.value) == ("policy.megatron_cfg.context_parallel_size", 2)
    assert "trainer.precision=bf16" in caught.value.fix
    for passes in ("trainer.accelerator=cpu", "trainer.accelerator=auto"):  # auto: as soon as the device is known
        load(*FP32_CP, passes)
    load(*FP32_CP, "trainer.accelerator=gpu", "policy.megatron_cfg.transformer_impl=local")
    load(*FP32_CP[1:], "trainer.accelerator=gpu", "trainer.precision=bf16")


OVER_TWO = ("trainer.num_nodes=4", "rollout.servers.nodes_per_server=2")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            (
                "trainer.num_nodes=3",
                OVER_TWO[1],
                "policy.train_global_batch_size=48",
                "algorithm.num_prompts_per_step=12",
            ),
            r"nodes_per_server = 2: must divide trainer\.num_nodes = 3",
        ),
        ((*OVER_TWO, "rollout.sglang_cfg.tp_size=1"), r"nodes_per_server = 2: must divide the 1 GPUs of a server"),
        (
            (*OVER_TWO, "rollout.servers.num_per_node=2"),
            r"nodes_per_server = 2: is for servers that we start, one on each",
        ),
        ((*OVER_TWO, "rollout.sglang_cfg.nnodes=2"), r"nnodes = 2: follows rollout\.servers\.nodes_per_server"),
        (
            (*OVER_TWO, "rollout.sglang_cfg.tp_size=8"),
            r"tp_size = 8 over 2 nodes, must be trainer\.devices = 8.*Fix: set rollout\.sglang_cfg\.tp_size to 2 \* 8 = 16",
        ),
    ],
)
def test_servers_over_several_nodes_come_out_even(overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        shared(8, 1, 16, *overrides)


@pytest.mark.parametrize(
    ("overrides", "places"),
    [
        (OVER_TWO, [(rank // 8, rank % 8) for rank in range(32)]),
        ((*OVER_TWO, "rollout.servers.placement=separate", "rollout.sglang_cfg.tp_size=4"),
         [(0, 8), (0, 9), (1, 8), (1, 9), (2, 8), (2, 9), (3, 8), (3, 9)]),
        (("rollout.servers.placement=separate", "rollout.sglang_cfg.tp_size=2", "rollout.servers.num_per_node=2",
          "trainer.num_nodes=2"), [(0, 8), (0, 9), (0, 10), (0, 11), (1, 8), (1, 9), (1, 10), (1, 11)]),
        ((*OVER_TWO, "rollout.sglang_cfg={tp_size: 8, pp_size: 2}"),
         [(node, gpu) for node in (0, 2) for gpu in range(8)]),
        (("trainer.num_nodes=4", "rollout.servers.nodes_per_server=4", "trainer.devices=1",
          "rollout.sglang_cfg={tp_size: 2, pp_size: 2}"), [(0, 0), (1, 0)]),
        (("rollout.sglang_cfg={tp_size: 2, pp_size: 2}", "rollout.servers.num_per_node=2"),
         [(0, 0), (0, 1), (0, 4), (0, 5)]),
    ],
)  # fmt: skip
def test_where_the_ranks_of_servers_are(overrides: tuple[str, ...], places: list[tuple[int, int]]) -> None:
    config = shared(8, 1, 16, *overrides)
    layout = rollout_layout(config)
    assert layout.num_ranks == len(places)
    assert [(place.node, place.gpu) for place in places_of(config, layout, is_cpu=False).servers] == places
