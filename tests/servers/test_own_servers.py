"""Runs that start their own servers, by the documented command; and what happens when something dies under them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Case

MARK = "MEGATRON_RL_TEST_MARK"
LIMIT_S = 420.0
HEALTH_TIMEOUT_S = 12
END_S = 30.0
"""Until nothing is left of a run whose trainer is gone; ten on an idle machine, but others run beside these tests."""
RETRIED = ("rollout/retried_connection", "rollout/retried_server_lost")
pytestmark = pytest.mark.timeout(2 * LIMIT_S)  # ours come first, and say more


@dataclass
class Started:
    """A run under way. Its processes carry a mark in their environment, or descend from those that do: what renames itself,
    as SGLang's processes do, overwrites the copy of its environment that others can read.
    """

    case: Case
    process: subprocess.Popen[str]
    mark: str
    output: Path
    seen: set[psutil.Process] = field(default_factory=set)

    def processes(self) -> list[psutil.Process]:
        """All living processes of the run. A zombie lives no more: it waits for a parent that may not reap."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark or process.parent() in self.seen:
                    self.seen.add(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return [process for process in self.seen if lives(process)]

    def find(self, part: str) -> list[psutil.Process]:
        """Processes with ``part`` in their command line, oldest first."""
        found = []
        for process in self.processes():
            try:
                if part in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return sorted(found, key=lambda process: process.create_time())

    def rows(self) -> list[dict[str, float]]:
        path = self.case.root / "tiny" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            self.processes()
            assert self.process.poll() is None, self.output.read_text()[-3000:]
            assert time.monotonic() < deadline, self.output.read_text()[-3000:]
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: len(self.rows()) >= step)

    def end(self, limit_s: float = LIMIT_S) -> int:
        """Exit status; then nothing of the run may be left."""
        deadline = time.monotonic() + limit_s
        while (status := self.process.poll()) is None:
            self.processes()
            assert time.monotonic() < deadline, f"still running after {limit_s:g} s: {self.output.read_text()[-3000:]}"
            time.sleep(0.1)
        deadline = time.monotonic() + 10
        while left := self.processes():
            assert time.monotonic() < deadline, [(p.pid, p.cmdline()[:6]) for p in left]
            time.sleep(0.1)
        print(self.output.read_text()[-3000:])  # pytest shows it beside a status that was not the expected one
        return status


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start(case: Case, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def make(*overrides: str, ranks: int = 2, program: Path | None = None, algorithm: str | None = None) -> Started:
        place = case if algorithm is None else case.with_algorithm(algorithm)
        mark, output = uuid.uuid4().hex, tmp_path / "output"
        overrides = (
            f"trainer.devices={ranks}",
            "rollout.engine=sglang",
            "rollout.max_new_tokens=150",
            "policy.train_micro_batch_tokens=1024",
            "algorithm.overlong.buffer=150",
            "rollout.sglang_cfg.max_total_tokens=8192",
            "rollout.servers.health_interval_s=1",
            f"rollout.servers.health_timeout_s={HEALTH_TIMEOUT_S}",
            *overrides,
        )
        command = [sys.executable, "-m", "megatron_rl.commands.cli", "train", *place.arguments(*overrides)]
        if program is not None:
            launch = ["megatron_rl.launch", "--standalone", f"--nproc-per-node={ranks}", str(program), "--config"]
            command = [sys.executable, "-m", *launch, *case.arguments(*overrides)]
        with output.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, MARK: mark, "PYTHONWARNINGS": "ignore"},
            )
        started.append(Started(case, process, mark, output))
        return started[-1]

    yield make
    for run in started:
        for process in run.processes():
            process.kill()
        run.process.wait()


def generating(run: Started) -> bool:
    """Whether the server works on rollouts now: its log tells of prefills after the last weight update."""
    log = run.case.root / "tiny" / "logs" / "server_0.log"
    text = log.read_text() if log.exists() else ""
    return text.rfind("Prefill batch") > text.rfind("new_version=")


def check_steps(run: Started, steps: int, rows_per_step: int = 16) -> None:
    """Every step is there once, with all its rows, sampled from the current weights."""
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert row["num_rollouts"] == rows_per_step
        assert row["rollout/staleness"] == 0.0
        assert row["mismatch/log_prob_abs_diff_max"] < 1e-3


def test_server_killed_in_mid_tree(start: Callable[..., Started]) -> None:
    """Its nodes are asked for again, and no tree has one twice: a tree of 3 x 3 x 3 has 39 nodes where nothing ends early. (The
    algorithm itself ends a run whose tree has lost a node.)"""
    run = start(
        "trainer.max_steps=2",
        "rollout.servers.placement=colocated",
        "rollout.max_new_tokens=100",
        "algorithm.overlong.buffer=100",
        algorithm="{name: spo_tree, num_prompts_per_step: 4, branch_factors: [3, 3, 3], tokens_per_level: 30, "
        "num_edges_per_step: 8}",
    )
    run.wait_for_step(1)
    run.wait_for(lambda: generating(run))
    run.find("megatron_rl.rollout.sglang_server")[0].kill()
    assert run.end() == 0
    rows = run.rows()
    assert [row["step"] for row in rows] == [1, 2]
    assert sum(row["rollout/server_restarts"] for row in rows) == 1
    lost = sum(row.get(name, 0) for row in rows for name in RETRIED)
    assert lost > 0, "the server was lost with nodes under way"
    for row in rows:
        assert row["num_rollouts"] == 4 * row["spo/leaves_per_tree"]
        assert 3 <= row["spo/nodes_per_tree"] <= 39 and row["rollout/generated_tokens"] <= 4 * (
            3 * 30 + 9 * 30 + 27 * 40
        )
        assert row.get("mismatch/log_prob_abs_diff_max", 0.0) < 1e-3  # absent where no edge was worth anything
        assert row["rollout/staleness"] == 0.0


def test_servers_that_die_or_freeze_around_weight_updates(start: Callable[..., Started]) -> None:
    """Two servers; planted_sync.py has the faults. All four of a process that stops or ends are found and mended."""
    run = start(
        "trainer.max_steps=5", "rollout.servers.num_per_node=2", program=Path(__file__).with_name("planted_sync.py")
    )
    assert run.end() == 0, run.output.read_text()[-3000:]
    check_steps(run, 5)
    text = run.output.read_text()
    assert text.count("planted: SIGKILL") == 2 and text.count("planted: SIGSTOP") == 2
    assert text.count("was killed by SIGKILL; restart") == 2 and text.count("gave no sign of life for 1") == 2
    assert sum(row["rollout/server_restarts"] for row in run.rows()) == 4
    frozen = [row["time/weight_sync_s"] for row in run.rows() if row["time/weight_sync_s"] > HEALTH_TIMEOUT_S]
    print("seconds of the updates with a frozen server:", frozen)


@pytest.mark.parametrize("who", ["launcher", "rank 0", "rank 1"])
def test_nothing_is_left_when_the_trainer_is_killed(start: Callable[..., Started], who: str) -> None:
    """While the server starts, which is when its children have no tie of their own to it yet."""
    run = start("trainer.max_steps=3")
    run.wait_for(lambda: len(run.find("megatron_rl.rollout.sglang_server")) >= 1)
    time.sleep(1.0)
    if who == "launcher":
        run.process.kill()
    else:
        ranks = run.find("megatron_rl.train")
        victims = [p for p in ranks if p.environ().get("RANK") == who[-1] and "launch" not in " ".join(p.cmdline())]
        victims[0].kill()
    assert run.end(END_S) != 0


def test_interrupted_from_the_keyboard(start: Callable[..., Started]) -> None:
    run = start("trainer.max_steps=1000")
    run.wait_for(lambda: len(run.find("megatron_rl.rollout.sglang_server")) >= 1)
    run.process.send_signal(signal.SIGINT)
    assert run.end(END_S) == 130
    assert run.output.read_text().splitlines()[-1] == "error: ended by SIGINT"


def test_port_taken(start: Callable[..., Started]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start(f"rollout.servers.base_port={port}")
        assert run.end(90) == 2
    assert (
        f"rollout.servers.base_port = {port}: something listens on 127.0.0.1:{port} already" in run.output.read_text()
    )


def test_server_that_cannot_start_says_why(start: Callable[..., Started]) -> None:
    run = start("rollout.sglang_cfg.context_length=-3")
    assert run.end(200) == 2
    text = run.output.read_text()
    assert text.count("error:") == 1 and "does not start" in text and "server_0.log" in text


def test_kv_pool_too_small_for_a_request(start: Callable[..., Started]) -> None:
    run = start("rollout.sglang_cfg.max_total_tokens=100")
    assert run.end(90) == 2
    assert "rollout.sglang_cfg.max_total_tokens = 100" in run.output.read_text()


def test_server_that_keeps_dying_ends_the_run(start: Callable[..., Started]) -> None:
    run = start("trainer.max_steps=50", "rollout.servers.max_restarts=0")
    run.wait_for_step(1)
    run.find("megatron_rl.rollout.sglang_server")[0].kill()
    assert run.end(120) == 2
    text = run.output.read_text()
    assert "rollout.servers.max_restarts = 0" in text and "was killed by SIGKILL" in text


def test_slow_start_is_named(start: Callable[..., Started]) -> None:
    run = start("rollout.servers.start_timeout_s=2")
    assert run.end(90) == 2
    text = run.output.read_text()
    assert text.count("error:") == 1 and "rollout.servers.start_timeout_s" in text and "server_0.log" in text
