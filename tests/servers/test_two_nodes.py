"""A run over two machines with a server on each: network namespaces that see neither each other's memory nor processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.convert.tables.table import hf_tensors
from tests.e2e.conftest import Case
from tests.e2e.test_multinode import Nodes, free_port
from tests.tiny_models import make_tiny_model

LIMIT_S = 500.0
SERVER_SIZE = int(os.environ.get("SERVER_SIZE", 1))
"""Ranks of each server. The figure in docs/results is of 2."""
ADDRESSES = ("198.51.100.5", "198.51.100.6")
pytestmark = [pytest.mark.timeout(LIMIT_S + 60), pytest.mark.slow]


def run(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two network namespaces with a cable between them."""
    names = [f"node{uuid.uuid4().hex[:6]}{n}" for n in range(2)]
    try:
        for name in names:
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
        run(f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for name, address in zip(names, ADDRESSES):
            run(f"ip -n {name} addr add {address}/30 dev eth0")
            run(f"ip -n {name} link set eth0 up")
        run(f"unshare --pid --fork --mount-proc ip netns exec {names[0]} true")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"network and process namespaces need rights that are not here: {error}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def bytes_between(name: str) -> int:
    folder = "/sys/class/net/eth0/statistics"
    return sum(int(run(f"ip netns exec {name} cat {folder}/{which}_bytes")) for which in ("rx", "tx"))


def test_stages_on_two_machines_reach_a_server_on_each(case: Case, machines: list[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "max_position_embeddings": 2048}
    model = make_tiny_model(tmp_path / "model", "qwen3", tied=False, seed=3, tokenizer=True, **sizes)
    here = Case(model, case.train, case.root)
    overrides = (
        "trainer.devices=2", "trainer.threads_per_rank=1", "trainer.max_steps=2",
        "policy.megatron_cfg.tensor_model_parallel_size=2", "policy.megatron_cfg.pipeline_model_parallel_size=2",
        "policy.train_micro_batch_tokens=512", "rollout.engine=sglang", "rollout.max_new_tokens=16",
        "rollout.servers.placement=colocated",
        f"rollout.sglang_cfg.tp_size={SERVER_SIZE}", "rollout.sglang_cfg.max_total_tokens=4096",
        "weight_sync.transport=shards", "exp_manager.create_checkpoint_callback=false",
    )  # fmt: skip
    nodes = Nodes(here, free_port("127.0.0.1"), ADDRESSES[0])
    launchers = [
        nodes.start(
            number, *overrides, within=("ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--mount-proc")
        )
        for number, name in enumerate(machines)
    ]
    try:
        consoles = [launcher.communicate(timeout=LIMIT_S)[0] for launcher in launchers]
        crossed = bytes_between(machines[0])
    finally:
        for launcher in launchers:
            launcher.kill()
        nodes.kill_all()
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(consoles)
    shape = read_shape(model)
    model_bytes = sum(4 * math.prod(extent) for extent in hf_tensors(shape).values())
    rows = [json.loads(line) for line in (case.root / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["weight_sync/servers_proven"] == 2.0
        assert row["weight_sync/between_nodes_bytes"] == pytest.approx(model_bytes, rel=1e-3), "each half crosses once"
    updates = 1 + len(rows)
    print(f"{updates} updates of {model_bytes:,} bytes, {crossed:,} bytes between the machines")
    # Activations and samples cross, too: some 18 MB a step. Had half of the model crossed twice, it would be more.
    assert updates * model_bytes < crossed < 2.5 * updates * model_bytes
