"""Planted hangs and deaths in whole runs: each ends in time, is named, and leaves no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Case

PLANTED = Path(__file__).with_name("planted.py")
LIMIT_S = 8.0
SETUP_S = 20.0
"""What planted.py sets for a rank that never arrives."""
START_S = 100.0
"""For imports and the first step, on a busy machine."""
END_S = 8.0
"""For torchrun and all processes to end, on a busy machine; torchrun alone would give a stopped rank 30 s."""


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    status: int
    error: str
    """The lines of the message."""
    seconds: float
    """From the fault to the end of the launcher."""
    logs: Path


def run_planted(case: Case, fault: str) -> Ending:
    marker = uuid.uuid4().hex
    arguments = case.arguments("trainer.devices=2", f"trainer.hang_timeout_s={LIMIT_S}", "trainer.max_steps=3")
    command = [sys.executable, "-m", "megatron_rl.launch", "--standalone", "--nproc-per-node=2", str(PLANTED)]
    process = subprocess.Popen(
        [*command, "--config", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PYTHONWARNINGS": "ignore",
            "PLANTED": fault,
            "PLANTED_AT": str(case.root / "planted_at"),
            "MARKER_OF_TEST": marker,
        },
    )
    try:
        output, _ = process.communicate(timeout=START_S + 3 * LIMIT_S)
        ended = time.time()
    finally:
        left = wait_for_end_of(marker)
        for other in left:
            other.kill()
    print(output)
    assert not left, f"left behind: {left}"
    seconds = ended - float((case.root / "planted_at").read_text())
    print(f"{seconds:.1f} s from the fault to the end")
    before, found, message = output.rpartition("error: ")
    assert found, output
    assert "error: " not in before.replace("Error: ", ""), "one message, not several"
    return Ending(process.returncode, message, seconds, case.root / "tiny/logs")


def wait_for_end_of(marker: str) -> list[psutil.Process]:
    """Processes that carry the marker in their environment, 10 s after the launcher has ended: scorers take a moment."""
    deadline = time.monotonic() + 10
    while (left := processes_with(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def processes_with(marker: str) -> list[psutil.Process]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(psutil.Process(int(path.parent.name)))
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def line_with(text: str, words: str) -> str:
    lines = [line for line in text.splitlines() if words in line]
    assert len(lines) == 1, text
    return lines[0]


def assert_hang(ending: Ending, limit_s: float = LIMIT_S) -> None:
    assert ending.status == 4 or ending.status == 1, "1: torchrun saw the stopped rank first"
    assert ending.error.startswith(f"hang: no progress for {limit_s:g} s (")
    assert (ending.logs / "hang.txt").read_text().strip() == ending.error.strip()
    assert limit_s / 2 < ending.seconds < 1.25 * limit_s + END_S


def test_a_rank_that_never_comes_back_from_the_loss(case: Case) -> None:
    ending = run_planted(case, "sleep:1:2")
    assert_hang(ending)
    culprit = line_with(ending.error, "rank 1 (pid")
    assert "is busy in phase forward_backward of step 2, at planted.py:misbehave, not in a collective" in culprit
    assert "waits for it in " in (other := line_with(ending.error, "rank 0 (pid"))
    assert "of step 2" in other
    assert "misbehave" in (ending.logs / "stacks_rank_1.txt").read_text()
    assert "collective" not in other and "distributed_c10d" in (ending.logs / "stacks_rank_0.txt").read_text()


def test_a_rank_that_skips_a_collective(case: Case) -> None:
    ending = run_planted(case, "skip:1:2")
    assert_hang(ending)
    line_with(ending.error, "the ranks wait in different collectives")
    assert "barrier" in (behind := line_with(ending.error, "rank 0 (pid"))
    assert "phase forward_backward of step 2, at planted.py:misbehave" in behind
    assert "waits" in (ahead := line_with(ending.error, "rank 1 (pid")) and "barrier" not in ahead


@pytest.mark.parametrize(("frozen", "other"), [(1, 0), (0, 1)])
def test_a_stopped_rank(case: Case, frozen: int, other: int) -> None:
    ending = run_planted(case, f"stop:{frozen}:2")
    assert_hang(ending)
    culprit = line_with(ending.error, f"rank {frozen} (pid")
    assert "has given no sign of life for" in culprit and "phase forward_backward of step 2" in culprit
    assert "waits for it in " in line_with(ending.error, f"rank {other} (pid")


def test_a_rank_that_never_arrives(case: Case) -> None:
    ending = run_planted(case, "late:1:0")
    assert_hang(ending, SETUP_S)
    assert "is busy in phase setup, at planted.py:never" in line_with(ending.error, "rank 1 (pid")
    assert "waits for it in init_process_group, phase setup" in line_with(ending.error, "rank 0 (pid")


def test_a_killed_rank(case: Case) -> None:
    ending = run_planted(case, "kill:1:2")
    assert ending.status == 1
    assert ending.error.startswith("rank 1 ended with signal SIGKILL")
    assert ending.seconds < END_S


def test_a_rank_that_raises(case: Case) -> None:
    ending = run_planted(case, "raise:1:2")
    assert ending.status == 1
    assert ending.error.startswith("rank 1 failed (in phase forward_backward, step 2): RuntimeError: planted")
    assert "in phase forward_backward" in (ending.logs / "rank_1.log").read_text()
    assert ending.seconds < END_S


def test_stopped_scoring_workers_are_replaced(case: Case) -> None:
    limits = ("data.scoring_timeout_s=2", "data.num_scoring_workers=2", "trainer.hang_timeout_s=60")
    process = case.start("trainer.max_steps=10", *limits)
    try:
        stopped = []
        while not stopped:
            assert process.poll() is None
            time.sleep(0.05)
            if (case.root / "tiny/metrics.jsonl").exists() and case.rows():
                stopped = [worker for worker in scoring_workers(process.pid) if not suspend(worker)]
        output, _ = process.communicate(timeout=START_S)
    finally:
        process.kill()
    assert process.returncode == 0, output
    rows = case.rows()
    assert [row["step"] for row in rows] == list(range(1, 11)) and len(stopped) == 2
    # Idle ones cost nothing; one that was stopped at work costs the score that it was at.
    assert sum(value for row in rows for key, value in row.items() if key.startswith("dropped/score_")) <= 2


def suspend(process: psutil.Process) -> None:
    process.suspend()


def scoring_workers(launcher: int) -> list[psutil.Process]:
    """Children of fork servers."""

    def is_forked(process: psutil.Process) -> bool:
        return "forkserver" in " ".join(process.cmdline())

    processes = psutil.Process(launcher).children(recursive=True)
    servers = {process.pid for process in processes if is_forked(process)}
    return [process for process in processes if process.pid in servers and process.ppid() in servers]
