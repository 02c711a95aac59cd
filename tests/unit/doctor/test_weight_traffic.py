"""``megatron-rl plan weights``: from a config to the plan of its sync."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.doctor.weight_traffic import print_report, report
from megatron_rl.weight_sync.pieces import TrainingLayout
from megatron_rl.weight_sync.served import RolloutLayout
from tests.policy_case import CONFIG
from tests.tiny_models import make_tiny_model


def test_a_config_gives_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny_model(tmp_path, "qwen3", tied=False, seed=1)
    overrides = [
        f"policy.model_path={model}", "trainer.devices=8", "policy.megatron_cfg.tensor_model_parallel_size=2",
        "policy.megatron_cfg.pipeline_model_parallel_size=2", "policy.megatron_cfg.context_parallel_size=2",
        "rollout.engine=sglang", "rollout.sglang_cfg.tp_size=4", "rollout.servers.num_per_node=2",
    ]  # fmt: skip
    found = report(load_config(CONFIG, overrides))
    assert found.training == TrainingLayout(tp_size=2, pp_size=2, dp_size=2)
    assert found.rollout == RolloutLayout(num_servers=2, tp_size=4)
    assert sum(found.plan.received().values()) == found.plan.held and found.traffic.num_messages >= 8
    print_report(found)
    printed = capsys.readouterr().out
    assert "8 trainer ranks -> 2 servers of 4 ranks" in printed and "1.000" in printed
