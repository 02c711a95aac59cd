"""A stranger tries every port of a run of two nodes with servers: as another user of the machine, and from another network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.process.run_key import FILE
from megatron_rl.rollout.sglang_server import KEY_VARIABLE
from tests.e2e.conftest import Case
from tests.e2e.test_multinode import Nodes, free_port

ATTACKER = Path(__file__).with_name("attacker.py")
NOBODY = 65534
LIMIT_S = 600.0
pytestmark = [pytest.mark.timeout(2 * LIMIT_S), pytest.mark.slow]


@pytest.fixture
def other_network() -> Iterator[tuple[str, list[str]]]:
    """This machine's address towards another network namespace, and the command that runs a program there.

    Without the rights for that, the address is loopback and the programs run here.
    """
    name, own, theirs = f"attack{uuid.uuid4().hex[:6]}", "198.51.100.1", "198.51.100.2"
    link = name[-8:]
    steps = [
        f"ip netns add {name}",
        f"ip link add {link}a type veth peer name {link}b netns {name}",
        f"ip addr add {own}/30 dev {link}a",
        f"ip link set {link}a up",
        f"ip -n {name} addr add {theirs}/30 dev {link}b",
        f"ip -n {name} link set {link}b up",
    ]
    try:
        for step in steps:
            subprocess.run(step.split(), check=True, capture_output=True)
        yield own, ["ip", "netns", "exec", name]
    except (OSError, subprocess.CalledProcessError):
        yield "127.0.0.1", []
    finally:
        for step in (f"ip link del {link}a", f"ip netns del {name}"):
            with open(os.devnull, "w") as nowhere:
                subprocess.run(step.split(), check=False, stderr=nowhere)


def attack(command: list[str], knows: dict[str, Any], user: int | None) -> dict[str, Any]:
    run = subprocess.run(
        [*command, sys.executable, str(ATTACKER), *([] if user is None else [str(user)])],
        input=json.dumps(knows),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd="/",
        env={"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "HOME": "/"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def routes(address: str, port: int, key: str) -> list[tuple[str, str]]:
    """Return method and path of all that a server offers, as its owner is told."""
    url = f"http://{address}:{port}/openapi.json"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        paths = json.load(reply)["paths"]
    more = [("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nothing")]
    return more + [(method.upper(), path) for path, methods in paths.items() for method in methods]


def test_a_stranger_gets_nothing(case: Case, other_network: tuple[str, list[str]]) -> None:
    host, elsewhere = other_network
    nodes = Nodes(case, free_port(host), host)
    overrides = (
        "trainer.devices=1",
        "trainer.max_steps=100000",
        "rollout.engine=sglang",
        "rollout.max_new_tokens=40",
        "policy.train_micro_batch_tokens=1024",
        "algorithm.overlong.buffer=40",
        "rollout.sglang_cfg.max_total_tokens=4096",
        "exp_manager.create_checkpoint_callback=false",
    )
    launchers = [nodes.start(0, *overrides), nodes.start(1, *overrides)]
    metrics = case.root / "tiny" / "metrics.jsonl"

    def wait_for_rows(number: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not (metrics.exists() and metrics.read_text().count("\n") >= number):
            ended = [launcher for launcher in launchers if launcher.poll() is not None]
            assert not ended, [launcher.communicate()[0] for launcher in ended]
            assert time.monotonic() < deadline
            time.sleep(0.2)

    try:
        wait_for_rows(2)
        processes = everything(nodes)
        listening = sorted({tuple(c.laddr) for p in processes for c in connections(p)})
        servers = [p for p in processes if KEY_VARIABLE in environment(p)]  # and their children
        (key,) = {environment(p)[KEY_VARIABLE] for p in servers}
        secrets = [key, (case.root / "tiny" / FILE).read_text()]
        open_to_http = [[option(p, "--host"), int(option(p, "--port"))] for p in servers if "--port" in p.cmdline()]
        assert len(open_to_http) == 2 and all(tuple(place) in listening for place in open_to_http)
        assert all(address == host for address, _ in open_to_http)
        stores = find_stores(listening)
        assert len(stores) == 2, "torchrun's and that of the weights; schedulers meet in files"
        assert {address for address, _ in listening} <= {host, "127.0.0.1"}, listening
        knows = {"ports": listening, "stores": stores, "routes": routes(*open_to_http[0], key)}
        knows["servers"] = open_to_http
        assert len(knows["routes"]) > 60

        for process in processes:
            assert not any(secret in " ".join(process.cmdline()) for secret in secrets), process.cmdline()
        for log in (case.root / "tiny" / "logs").glob("*.log"):
            assert not any(secret in log.read_text() for secret in secrets), log

        is_root = os.getuid() == 0
        files = [f"/proc/{p.pid}/environ" for p in processes] + [str(case.root / "tiny" / FILE)]
        for command, user, what in (([], NOBODY if is_root else None, files if is_root else []), (elsewhere, None, [])):
            before = metrics.read_text().count("\n")
            got = attack(command, {**knows, "mark": secrets[1], "files": what}, user)
            print(json.dumps({**got, "answered": len(got["answered"])}))
            health = {"/health", "/health_generate", "/ready"}
            assert {path for path, *_ in got["answered"]} <= health, got["answered"]
            assert not got["files"] and not got["sockets"]
            assert open_to_http[0] in got["reachable"] and open_to_http[1] in got["reachable"]
            if command:
                assert all(address == host for address, _ in got["reachable"])
            assert got["stores"], "it had its hands on a store"
            wait_for_rows(before + 4)
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert all(row["rollout/staleness"] == 0.0 and row["mismatch/log_prob_abs_diff_max"] < 1e-3 for row in rows)
    finally:
        for launcher in launchers:
            launcher.send_signal(signal.SIGTERM)
        for launcher in launchers:
            launcher.communicate(timeout=60)
    nodes.assert_none_left()


def everything(nodes: Nodes) -> list[psutil.Process]:
    """The run's processes, those of its servers too, which hide their environment behind a new name."""
    found = {psutil.Process(pid) for pid in nodes.processes()}
    return list(found | {child for process in found for child in process.children(recursive=True)})


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def connections(process: psutil.Process) -> list[Any]:
    try:
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return []


def option(process: psutil.Process, name: str) -> str:
    line = process.cmdline()
    return line[line.index(name) + 1]


FIND_STORES = """
import datetime, json, os, signal, sys
import torch.distributed as dist

places, asked = json.load(sys.stdin), {}
for place in places:
    if not (pid := os.fork()):  # what listens there but is no store may never answer
        signal.alarm(15)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        dist.TCPStore(*place, is_master=False, timeout=datetime.timedelta(seconds=5)).num_keys()
        os._exit(0)
    asked[pid] = place
json.dump([asked[pid] for pid in asked if os.waitpid(pid, 0)[1] == 0], sys.stdout)
"""


def find_stores(places: list[tuple[str, int]]) -> list[list[Any]]:
    """Return the places where a store of torch answers."""
    command = [sys.executable, "-c", FIND_STORES]
    run = subprocess.run(command, input=json.dumps(places), capture_output=True, text=True, timeout=LIMIT_S)
    return json.loads(run.stdout)
