"""The config of presampling, made from that of the training that follows."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.commands.presample import adapt
from megatron_rl.config import load_config

ONLINE = Path(__file__).parents[3] / "configs" / "online.yaml"


def test_nothing_is_logged_to_the_sinks_of_the_training() -> None:
    paths = ["policy.model_path=m", "data.train=d", "data.task=gsm8k"]
    sinks = ["exp_manager.sinks=[lab.sinks:Board]", "exp_manager.create_wandb_logger=true"]
    manager = adapt(load_config(ONLINE, [*paths, "algorithm.name=grpo", *sinks])).exp_manager
    assert manager.sinks == []
    assert not any(value for name, value in vars(manager).items() if name.endswith("_logger"))
