"""Signs of life: a stopped process gives none, one that waits or computes does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megatron_rl.process import heartbeat
from megatron_rl.process.heartbeat import Heartbeats

WORK = {
    "waits": "time.sleep(60)",
    "computes": "while True: pass",
}


@pytest.fixture
def heartbeats() -> Iterator[Heartbeats]:
    made = Heartbeats()
    yield made
    made.close()
    assert not made.folder.exists()


def start(heartbeats: Heartbeats, work: str) -> subprocess.Popen[bytes]:
    code = f"import time; from megatron_rl.process import heartbeat; heartbeat.start()\n{work}"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, heartbeat.VARIABLE: str(heartbeats.folder)}
    )
    deadline = time.monotonic() + 30
    while not (heartbeats.folder / str(process.pid)).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def silence_after(heartbeats: Heartbeats, seconds: float) -> float:
    """The silence that a starter sees that looks ten times a second."""
    for _ in range(int(seconds * 10)):
        time.sleep(0.1)
        silence = heartbeats.silence_s(0.1)
    return silence


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_one_that_stops_is_silent_until_it_goes_on(heartbeats: Heartbeats, work: str) -> None:
    process = start(heartbeats, work)
    try:
        assert silence_after(heartbeats, 2.5) < 2.0
        process.send_signal(signal.SIGSTOP)
        assert silence_after(heartbeats, 2.5) >= 2.0
        process.send_signal(signal.SIGCONT)
        assert silence_after(heartbeats, 1.5) < 1.5
    finally:
        process.kill()
        process.wait()
    assert heartbeats.silence_s(100.0) == 0.0  # one that has ended does not count; its starter sees that itself
    assert not list(heartbeats.folder.iterdir())


def test_signs_come_again_after_one_that_failed(heartbeats: Heartbeats) -> None:
    process = start(heartbeats, "heartbeat.BEAT_S = 0.01\ntime.sleep(60)")
    try:
        away = heartbeats.folder.with_name(f"{heartbeats.folder.name}_away")
        heartbeats.folder.rename(away)
        time.sleep(1.5)
        away.rename(heartbeats.folder)
        last = (heartbeats.folder / str(process.pid)).stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (heartbeats.folder / str(process.pid)).stat().st_mtime_ns == last:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


def test_a_clock_that_jumps_is_a_sign_like_any_other(heartbeats: Heartbeats) -> None:
    file = heartbeats.folder / str(os.getpid())
    file.touch()
    assert heartbeats.silence_s(1.0) == 0.0 and heartbeats.silence_s(1.0) == 1.0
    os.utime(file, (1.0, 1.0))
    assert heartbeats.silence_s(1.0) == 0.0 and heartbeats.silence_s(1.0) == 1.0


def test_the_processes_of_an_earlier_start_are_forgotten(heartbeats: Heartbeats) -> None:
    (heartbeats.folder / str(os.getpid())).touch()
    heartbeats.silence_s(1.0)
    assert heartbeats.silence_s(50.0) == 50.0
    heartbeats.forget()
    assert heartbeats.silence_s(1.0) == 0.0
