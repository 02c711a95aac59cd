"""One server of two ranks over two nodes, both on this machine; a part that dies is mended with the other."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.e2e.conftest import Case
from tests.e2e.test_multinode import Nodes, free_port

LIMIT_S = 420.0
pytestmark = [pytest.mark.timeout(2 * LIMIT_S), pytest.mark.slow]


def test_a_server_over_two_nodes_serves_and_is_mended(case: Case) -> None:
    nodes = Nodes(case, free_port("127.0.0.1"))
    overrides = (
        "trainer.devices=1",
        "trainer.max_steps=4",
        "rollout.engine=sglang",
        "rollout.max_new_tokens=150",
        "policy.train_micro_batch_tokens=1024",
        "algorithm.overlong.buffer=150",
        "rollout.sglang_cfg={max_total_tokens: 8192, tp_size: 2}",
        "rollout.servers.nodes_per_server=2",
        "rollout.servers.health_timeout_s=120",
        "exp_manager.create_checkpoint_callback=false",
    )
    metrics = case.root / "tiny" / "metrics.jsonl"
    try:
        launchers = [nodes.start(0, *overrides), nodes.start(1, *overrides)]
        deadline = time.monotonic() + LIMIT_S
        while not metrics.exists() or not metrics.read_text():
            assert all(launcher.poll() is None for launcher in launchers), [each.communicate() for each in launchers]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        commands = {pid: psutil.Process(pid).cmdline() for pid in nodes.processes()}
        servers = {pid: line for pid, line in commands.items() if "--node-rank" in line}
        parts = {line[line.index("--node-rank") + 1]: pid for pid, line in servers.items()}
        assert parts.keys() == {"0", "1"}
        psutil.Process(parts["1"]).kill()
        outputs = [launcher.communicate(timeout=LIMIT_S)[0] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
        nodes.assert_none_left()
    finally:
        nodes.kill_all()
    rows = case.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert sum(row["rollout/server_restarts"] for row in rows) == 1, "of the server, not of its parts"
    for row in rows:
        assert row["num_rollouts"] == 16 and row["rollout/staleness"] == 0.0
        assert row["mismatch/log_prob_abs_diff_max"] < 1e-3
    logs = case.root / "tiny" / "logs"
    assert {path.name for path in logs.glob("server_*")} == {"server_0.log", "server_0_part_1.log"}
