"""The quickstart takes what the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.quickstart.run import SGLANG, of_machine
from megatron_rl.config import load_config

HERE = Path(__file__).parents[3] / "examples" / "quickstart"


def test_devices_and_precision_follow_the_machine() -> None:
    assert of_machine(0) == of_machine(0, uses_sglang=True) == []
    assert of_machine(1) == ["trainer.devices=1", "trainer.precision=bf16"]
    assert of_machine(2) == of_machine(8) == ["trainer.devices=2", "trainer.precision=bf16"]


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 8])
def test_every_part_loads_on_every_machine(num_gpus: int) -> None:
    warm, grpo = (load_config(HERE / name, of_machine(num_gpus)) for name in ("warm_start.yaml", "grpo.yaml"))
    served = load_config(HERE / "grpo.yaml", [*SGLANG, *of_machine(num_gpus, uses_sglang=True)])
    for config in (warm, grpo, served):
        assert config.trainer.devices == (min(2, num_gpus) or 2)
        assert config.trainer.precision == ("bf16" if num_gpus else "fp32")
    # On GPUs each of the trainer's has a server, so that no further one is needed.
    assert served.rollout.is_colocated == (num_gpus > 0)
    assert served.rollout.servers.num_per_node == (served.trainer.devices if num_gpus else 1)
