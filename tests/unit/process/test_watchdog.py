"""Who is waited for, who waits; and when a process ends itself."""

from __future__ import annotations

import json
import linecache
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from torch.distributed import distributed_c10d
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_rl.launch import launcher
from megatron_rl.metrics import PhaseTimer, progress, terminal
from megatron_rl.process import activity, hang_report, watchdog
from megatron_rl.process.hang_report import RankState, explain, locate

# ---------------------------------------------------------------------------------------------------- who is to blame

WAITS = RankState(
    rank=0,
    pid=100,
    host="a",
    parent=1,
    error_file="",
    beat=1,
    time=0.0,
    step=7,
    phase="optimizer",
    num_phases=40,
    progress=80,
    idle_s=9.0,
    collective="all_reduce",
    where="model/policy.py:train_step",
)


def waits(rank: int, **changes: object) -> RankState:
    return replace(WAITS, rank=rank, pid=100 + rank, **changes)  # type: ignore[arg-type]


def works(rank: int, **changes: object) -> RankState:
    return waits(rank, **({"collective": "", "where": "losses/clipped.py:loss"} | changes))


def message(*states: RankState | None, silent_s: dict[int, float] | None = None) -> list[str]:
    first, *lines = explain(states, silent_s or {}, "9 s").splitlines()
    assert first == "hang: no progress for 9 s"
    return [line.strip() for line in lines]


IN_ALL_REDUCE = "in all_reduce, phase optimizer of step 7, at model/policy.py:train_step"
IN_LOSS = "in phase optimizer of step 7, at losses/clipped.py:loss"


def test_a_rank_outside_the_collective_is_waited_for() -> None:
    assert message(waits(0), works(1), waits(2)) == [
        f"rank 1 (pid 101 on a) is busy {IN_LOSS}, not in a collective",
        f"ranks 0, 2: each waits for it {IN_ALL_REDUCE}",
    ]


def test_a_silent_rank_is_waited_for_whatever_it_did_last() -> None:
    assert message(waits(0), works(1), waits(2), silent_s={2: 31.4}) == [
        f"rank 2 (pid 102 on a) has given no sign of life for 31 s; it was last seen in {IN_ALL_REDUCE[15:]}",
        f"rank 0 (pid 100 on a) waits for it {IN_ALL_REDUCE}",
        f"rank 1 (pid 101 on a) is busy {IN_LOSS}",
    ]


def test_a_rank_that_never_wrote() -> None:
    lines = message(waits(0, step=0, phase="setup"), None, silent_s={1: 9.0})
    assert lines == [
        "rank 1 has given no sign of life since the start, 9 s ago",
        "rank 0 (pid 100 on a) waits for it in all_reduce, phase setup, at model/policy.py:train_step",
    ]


def test_of_ranks_in_collectives_the_one_with_fewer_phases_is_waited_for() -> None:
    behind = waits(1, phase="scoring", num_phases=39, collective="broadcast", where="rollout/share.py:share")
    assert message(waits(0), behind) == [
        "rank 1 (pid 101 on a) is the furthest behind: waits in broadcast, phase scoring of step 7, at rollout/share.py:share",
        f"rank 0 (pid 100 on a) waits for it {IN_ALL_REDUCE}",
    ]


def test_the_step_counts_before_the_phases() -> None:
    assert message(waits(0, step=6, num_phases=50), waits(1))[0].startswith(
        "rank 0 (pid 100 on a) is the furthest behind"
    )


def test_different_collectives_at_the_same_place_in_the_program() -> None:
    assert message(waits(0, collective="barrier"), waits(1)) == [
        "the ranks wait in different collectives, each for the others",
        "rank 0 (pid 100 on a) waits in barrier, phase optimizer of step 7, at model/policy.py:train_step",
        f"rank 1 (pid 101 on a) waits {IN_ALL_REDUCE}",
    ]


def test_the_same_collective_blames_nobody() -> None:
    assert message(waits(0), waits(1)) == [f"ranks 0, 1: each waits {IN_ALL_REDUCE}"]


def test_of_busy_ranks_only_those_behind_are_waited_for() -> None:
    lines = message(waits(0), works(1), works(2, num_phases=39))
    assert lines[0].startswith("rank 2 (pid 102 on a) is busy")
    assert lines[2] == f"rank 1 (pid 101 on a) is busy {IN_LOSS}"


def test_a_rank_that_has_ended_is_waited_for() -> None:
    assert message(waits(0), waits(1, has_ended=True))[0] == "rank 1 (pid 101 on a) has ended its work"


def test_a_rank_alone_after_the_others_ended_is_named() -> None:
    assert message(works(0), waits(1, has_ended=True)) == [
        f"rank 0 (pid 100 on a) is busy {IN_LOSS}, not in a collective"
    ]


def test_a_single_rank_is_named() -> None:
    assert message(works(0)) == [f"rank 0 (pid 100 on a) is busy {IN_LOSS}"]


def test_notes_are_quoted() -> None:
    assert message(works(0, note="120 of 256"))[-1] == "rank 0 noted: 120 of 256"


# ---------------------------------------------------------------------------------------------------- where a thread is


def test_where_is_the_innermost_function_that_is_not_of_a_library() -> None:
    release = threading.Event()

    def stuck() -> None:
        release.wait(10)

    thread = threading.Thread(target=stuck)
    thread.start()
    try:
        assert thread.ident is not None
        assert locate(sys._current_frames()[thread.ident]) == ("", "test_watchdog.py:stuck")
    finally:
        release.set()
        thread.join()


def test_the_outermost_public_name_of_a_collective() -> None:
    """Functions with the names and the file of torch's, and a caller."""
    source = """
def all_gather_object(innermost): return wrapper(innermost)
def wrapper(innermost): return all_gather(innermost)
def all_gather(innermost): return _object(innermost)
def _object(innermost): return innermost()
"""
    names: dict = {}
    exec(compile(source, distributed_c10d.__file__, "exec"), names)
    here = "test_watchdog.py:test_the_outermost_public_name_of_a_collective"
    assert locate(names["all_gather_object"](sys._getframe)) == ("all_gather_object", here)


def test_a_shared_helper_is_left_out_for_its_caller() -> None:
    names: dict = {}
    exec(
        compile("def gather(innermost): return innermost()", f"{hang_report._PACKAGE}parallel/agree.py", "exec"), names
    )
    assert locate(names["gather"](sys._getframe))[1].endswith(":test_a_shared_helper_is_left_out_for_its_caller")


def test_looking_at_a_rank_keeps_no_source_files() -> None:
    linecache.clearcache()
    assert locate(sys._getframe()) == ("", "test_watchdog.py:test_looking_at_a_rank_keeps_no_source_files")
    assert not linecache.cache


def test_an_asynchronous_wait_shows_by_its_line() -> None:
    class Work:
        def wait(self) -> object:
            return sys._getframe(1)

    def finish_sync() -> object:
        return Work().wait()

    frame = finish_sync()
    assert hang_report._collective(frame) == "finish_sync"  # type: ignore[arg-type]


def test_phases_bars_and_errors_are_told() -> None:
    watchdog.start(Path("nowhere"), rank=0, world_size=1, timeout_s=None)
    terminal.listen(activity.beat)
    told = activity.current()
    try:
        assert told.phase == "setup"
        activity.set_step(2)
        timer = PhaseTimer(on_border=activity.enter)
        with pytest.raises(KeyError) as caught, activity.phase("evaluation"), timer("generation"), timer("inner"):
            assert told.phase == "evaluation/inner" and told.num_phases == 3
            before = told.progress
            list(progress(range(3), "rows"))
            assert told.progress == before + 3
            raise KeyError
        assert caught.value.__notes__ == ["in phase inner", "in phase generation", "in phase evaluation"]
        assert told.phase == ""
    finally:
        terminal.listen(None)
        watchdog.stop()
    assert not Path("nowhere").exists()


# ---------------------------------------------------------------------------------------------------- a process of its own

LIMIT_S = 1.0
PROGRAM = """
import sys, time
from pathlib import Path
from megatron_rl.process import activity, watchdog

directory, rank, world_size, beats, every_s = sys.argv[1:]
watchdog.SETUP_S = 0.0
watchdog.start(Path(directory), rank=int(rank), world_size=int(world_size), timeout_s={limit})
activity.note("a note")
for _ in range(int(beats)):
    activity.beat()
    time.sleep(float(every_s))
watchdog.stop()
"""


def start(
    directory: Path, *, rank: int = 0, world_size: int = 1, beats: int = 1, every_s: float = 60.0
) -> subprocess.Popen:
    arguments = [str(x) for x in (directory, rank, world_size, beats, every_s)]
    program = PROGRAM.format(limit=LIMIT_S)
    environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(directory / "error.json")}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 30
    while not (directory / f"state/rank_{rank}.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    return process


def end(process: subprocess.Popen, timeout_s: float = 20 * LIMIT_S) -> str:
    try:
        return process.communicate(timeout=timeout_s)[1]
    finally:
        process.kill()
        process.wait()


def play(directory: Path, rank: int, *, seconds: float, idle_s: float | None = 0.0) -> None:
    """Write the states of another rank; idle_s None lets the idle time grow."""
    started = time.monotonic()
    beat = 0
    while (passed := time.monotonic() - started) < seconds:
        beat += 1
        state = waits(rank, beat=beat, idle_s=passed if idle_s is None else idle_s)
        watchdog._write_whole(directory / f"state/rank_{rank}.json", json.dumps(asdict(state)))
        time.sleep(LIMIT_S / 20)


def test_an_idle_process_ends_itself_with_message_stacks_and_report(tmp_path: Path) -> None:
    process = start(tmp_path)
    started = time.monotonic()
    end(process)
    assert process.returncode == watchdog.EXIT_STATUS
    assert 0.5 * LIMIT_S < time.monotonic() - started < 1.25 * LIMIT_S + 5
    text = (tmp_path / "hang.txt").read_text().strip()
    assert f"rank 0 (pid {process.pid} on " in text and "is busy in phase setup" in text and "noted: a note" in text
    assert "<string>" in (tmp_path / "stacks_rank_0.txt").read_text()
    assert json.loads((tmp_path / "error.json").read_text())["message"] == text


@pytest.mark.slow
def test_beats_keep_it_alive_and_the_end_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    for half in ("state/rank_0.json.123.tmp", "hang.0.tmp"):  # of an earlier start, killed in the midst of writing
        (tmp_path / half).touch()
    process = start(tmp_path, beats=30, every_s=LIMIT_S / 10)
    end(process)
    assert process.returncode == 0
    assert json.loads((tmp_path / "state/rank_0.json").read_text())["has_ended"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "hang.txt").exists()


@pytest.mark.slow
def test_waiting_for_a_rank_that_works_is_no_hang(tmp_path: Path) -> None:
    process = start(tmp_path, world_size=2)
    play(tmp_path, 1, seconds=3 * LIMIT_S)
    assert process.poll() is None
    play(tmp_path, 1, seconds=3 * LIMIT_S, idle_s=None)
    end(process)
    assert process.returncode == watchdog.EXIT_STATUS
    text = (tmp_path / "hang.txt").read_text()
    assert "rank 0 (pid" in text.splitlines()[1] and "not in a collective" in text.splitlines()[1]
    assert "rank 1 (pid 101 on a) waits for it in all_reduce" in text


def test_a_silent_neighbour_ends_a_process_that_works(tmp_path: Path) -> None:
    process = start(tmp_path, rank=1, world_size=3, beats=1000, every_s=LIMIT_S / 10)
    for rank in (0, 2):
        play(tmp_path, rank, seconds=LIMIT_S / 10)
    end(process)
    assert process.returncode == watchdog.EXIT_STATUS
    assert "rank 2 (pid 102 on a) has given no sign of life for 1 s" in (tmp_path / "hang.txt").read_text()


def test_the_first_message_stays(tmp_path: Path) -> None:
    process = start(tmp_path, rank=1, world_size=2)
    (tmp_path / "hang.txt").write_text("hang: the message of another rank\n")
    stderr = end(process)
    assert process.returncode == watchdog.EXIT_STATUS
    assert stderr == "error: hang: the message of another rank\n"
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "hang: the message of another rank"


@pytest.mark.slow
def test_a_process_that_was_stopped_for_a_while_has_not_been_idle(tmp_path: Path) -> None:
    process = start(tmp_path, beats=4, every_s=LIMIT_S / 2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3 * LIMIT_S)
    process.send_signal(signal.SIGCONT)
    end(process)
    assert process.returncode == 0


def test_what_an_earlier_run_left_is_gone(tmp_path: Path) -> None:
    (tmp_path / "hang.txt").write_text("old")
    process = start(tmp_path)
    assert not (tmp_path / "hang.txt").exists()
    process.kill()
    end(process)


# ---------------------------------------------------------------------------------------------------- the launcher's line


def failure(tmp_path: Path, exit_code: int, text: str = "", at_s: float = 0.0) -> ProcessFailure:
    path = tmp_path / f"{time.monotonic_ns()}.json"
    if text:
        path.write_text(json.dumps({"message": text, "timestamp": at_s}))
    return ProcessFailure(0, 100, exit_code, str(path))


def chosen(*failures: ProcessFailure) -> int:
    return min(range(len(failures)), key=lambda rank: launcher._distance_from_cause(failures[rank]))


def test_the_cause_among_failures_of_one_moment(tmp_path: Path) -> None:
    hang = failure(tmp_path, 4, "hang: x")
    killed, asked = failure(tmp_path, -9), failure(tmp_path, -15)
    early, late = failure(tmp_path, 1, "rank 1 failed: y", 5.25), failure(tmp_path, 1, "rank 0 failed: z", 5.5)
    assert chosen(killed, hang, early) == 1
    assert chosen(late, killed, asked) == 1
    assert chosen(asked, late, early) == 2
    assert launcher._describe(3, hang) == "hang: x"
    assert launcher._describe(3, killed) == "rank 3 ended with signal SIGKILL; see logs/ in the run's folder"
    assert launcher._describe(1, early).startswith("rank 1 failed: y\n")
    assert launcher._describe(1, failure(tmp_path, 7)) == "rank 1 ended with status 7; see logs/ in the run's folder"
