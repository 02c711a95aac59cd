"""One run on several nodes. A node is a launcher; here both are on this machine, and meet over loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_rl.launch.node_watch import BEAT_S, GRACE_S, LOST_S
from tests.e2e.conftest import Case

LAUNCH = Path(__file__).parents[2] / "examples/launch"
SCRIPT = LAUNCH / "torchrun_multinode.sh"
START_S = 150.0
"""For four ranks to import everything, on a busy machine with two cores."""
LOSS_BOUND_S = LOST_S + GRACE_S + 2 * GRACE_S + 2 * BEAT_S
"""docs/launch.md: from the death of a node to the end of the others."""


@dataclass
class Nodes:
    """Launchers of one run, all marked, so that whatever they leave behind can be found."""

    case: Case
    port: int
    host: str = "127.0.0.1"
    marker: str = field(default_factory=lambda: f"MULTINODE_TEST={uuid.uuid4().hex}")
    launchers: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, node_rank: int, *overrides: str, within: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """The documented script, as a user starts it on one node; ``within`` is a command that starts commands."""
        name, _, value = self.marker.partition("=")
        process = subprocess.Popen(
            [*within, str(SCRIPT), *self.case.arguments("trainer.devices=2", "trainer.threads_per_rank=1", *overrides)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PYTHON": sys.executable,
                "PYTHONWARNINGS": "ignore",
                "NNODES": "2",
                "NODE_RANK": str(node_rank),
                "MASTER_ADDR": self.host,
                "MASTER_PORT": str(self.port),
                name: value,
            },
        )
        self.launchers.append(process)
        return process

    def processes(self) -> list[int]:
        """Ids of the live processes that carry the mark."""
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if self._is_mine(path)]

    def _is_mine(self, environment: Path) -> bool:
        try:
            return self.marker.encode() in environment.read_bytes()  # empty for those that only wait to be reaped
        except OSError:
            return False

    def kill_all(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def assert_none_left(self, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while left := self.processes():
            assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
            time.sleep(0.1)


def free_port(host: str) -> int:
    """A moment ago, at least."""
    with socket.create_server((host, 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def nodes(case: Case) -> Iterator[Nodes]:
    nodes = Nodes(case, free_port("127.0.0.1"))
    yield nodes
    nodes.kill_all()
    for launcher in nodes.launchers:
        launcher.communicate()


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_two_nodes_of_two_ranks_give_the_result_of_one_node_of_four(case: Case, nodes: Nodes) -> None:
    assert case.run("exp_manager.name=recorded", "rollout.record=true", "trainer.max_steps=2") == [0]
    replay = ["rollout.engine=recorded", f"rollout.recorded_dir={case.root}/recorded/rollouts", "trainer.max_steps=2"]
    layout = ["policy.megatron_cfg.tensor_model_parallel_size=2"]
    assert case.run("exp_manager.name=one_node", *replay, *layout, ranks=4) == [0, 0, 0, 0]

    several = ["exp_manager.name=two_nodes", *replay, *layout]
    first, second = nodes.start(0, *several), nodes.start(1, *several)
    console, other_console = first.communicate(timeout=START_S)[0], second.communicate(timeout=START_S)[0]
    assert (first.returncode, second.returncode) == (0, 0), console + other_console
    nodes.assert_none_left()

    one, two = case.rows("one_node"), case.rows("two_nodes")
    assert [row["step"] for row in two] == [1, 2] and [row.keys() for row in one] == [row.keys() for row in two]
    for mine, reference in zip(two, one):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        assert mine["reward/mean"] == reference["reward/mean"]

    run = case.root / "two_nodes"
    assert "$ torchrun --nnodes=2 --node-rank=0 --master-addr=127.0.0.1" in console and "checkpoint" in console
    assert other_console == f"node 1 of 2: logs in {run}/logs/rank_N.log, N from 2 to 3\n"
    assert {path.name for path in (run / "logs").glob("*.log")} == {f"rank_{rank}.log" for rank in (1, 2, 3)}
    assert not list(run.glob(".seen_by_all*"))
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000002"]


def test_nodes_with_different_configs_end_before_anything_is_written(case: Case, nodes: Nodes) -> None:
    first, second = nodes.start(0, "trainer.max_steps=4"), nodes.start(1, "trainer.max_steps=6", "trainer.seed=8")
    started = time.monotonic()
    for launcher in (first, second):
        output, _ = launcher.communicate(timeout=START_S)
        assert launcher.returncode == 2, output
        assert len(errors(output)) == 1, output
        (error,) = errors(output)
        assert "trainer.max_steps: rank 0 has 4, rank 2, 3 6" in error and "different: trainer.seed" in error
    assert time.monotonic() - started < START_S
    nodes.assert_none_left()
    assert {path.name for path in (case.root / "tiny").iterdir()} == {"logs", ".key", ".lock", ".lock.1"}


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (0, signal.SIGKILL),
        (1, signal.SIGSTOP),  # as a machine that has vanished: no connection breaks, and its ranks may even go on
    ],
)
def test_the_loss_of_a_node_ends_the_other(case: Case, nodes: Nodes, victim: int, how: signal.Signals) -> None:
    long = ["trainer.max_steps=100000", "exp_manager.create_checkpoint_callback=false"]
    launchers = [nodes.start(0, *long), nodes.start(1, *long)]
    metrics = case.root / "tiny/metrics.jsonl"
    deadline = time.monotonic() + START_S
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.1)
    launchers[victim].send_signal(how)
    lost = time.monotonic()
    survivor = launchers[1 - victim]
    output, _ = survivor.communicate(timeout=LOSS_BOUND_S)
    print(f"{time.monotonic() - lost:.1f} s from the loss to the end\n{output}")
    assert survivor.returncode not in (0, 2), output
    assert f"error: node {victim} is lost: no sign of life for {LOST_S:.0f} s" in errors(output)
    if how == signal.SIGSTOP:
        launchers[victim].send_signal(signal.SIGCONT)
        output, _ = launchers[victim].communicate(timeout=LOSS_BOUND_S)
        assert launchers[victim].returncode not in (0, 2), output
    nodes.assert_none_left()


def test_a_second_start_of_a_node_does_no_harm(case: Case, nodes: Nodes) -> None:
    long = ["trainer.max_steps=100000", "exp_manager.create_checkpoint_callback=false", "trainer.timeout_s=60"]
    first = [nodes.start(0, *long), nodes.start(1, *long)]
    folder = case.root / "tiny"

    def wait_for_rows(number: int) -> None:
        deadline = time.monotonic() + START_S
        while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < number:
            assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in first)
            time.sleep(0.1)

    wait_for_rows(1)
    states = sorted(path.name for path in (folder / "logs/state").iterdir())
    for node_rank in (0, 1):
        second = nodes.start(node_rank, *long)
        (error,) = errors(second.communicate(timeout=START_S)[0])
        assert second.returncode == 2 and f"is in use by process {first[node_rank].pid} of user" in error
    (folder / ".lock.1").unlink()  # as where locks do not reach
    second = nodes.start(1, *long, "trainer.timeout_s=3")
    (error,) = errors(second.communicate(timeout=START_S)[0])
    assert second.returncode == 1 and "the nodes did not meet" in error and "node 0 gave no answer" in error
    wait_for_rows((folder / "metrics.jsonl").read_text().count("\n") + 3)
    assert sorted(path.name for path in (folder / "logs/state").iterdir()) == states
    first[0].send_signal(signal.SIGTERM)
    for launcher in first:
        launcher.communicate(timeout=LOSS_BOUND_S)
    nodes.assert_none_left()


def test_a_node_that_is_refused_says_so_and_the_other_stops_waiting(case: Case, nodes: Nodes) -> None:
    first = nodes.start(0, "trainer.timeout_s=4")
    second = nodes.start(1, "trainer.timeout_s=4", "data.train=/nowhere.jsonl")
    output, _ = second.communicate(timeout=START_S)
    assert second.returncode == 2 and "data.train" in errors(output)[0]
    output, _ = first.communicate(timeout=START_S)
    (error,) = errors(output)
    assert first.returncode == 1 and "the nodes did not meet" in error
    nodes.assert_none_left()


def test_the_scripts_are_valid_shell() -> None:
    for path in (SCRIPT, LAUNCH / "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(path)], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", str(path)], check=True)
