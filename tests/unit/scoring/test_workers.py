import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.scoring.workers import ScoringPool, _How, _JobChunk, _score_chunk
from megatron_rl.tasks import TASKS
from megatron_rl.tasks.reward import Attempt
from megatron_rl.types import Problem, Score

HERE = Path(__file__).parent
TASK = "misbehaving_task:TASK"  # next to this file, so pytest has its folder on sys.path


def job(answer, response, task=TASK, **fields):
    return Attempt(Problem("id", "text", answer, task=task, **fields), response)


GOOD = job("yes", "yes")
HOW = _How(None, "{}", 10.0)
CORRECT = Score(1.0, reason="correct")


@pytest.fixture(scope="module")
def pool():
    with ScoringPool([TASK], num_workers=2, timeout_s=1.0) as pool:
        pool.score([GOOD])  # workers are up: times below are without their start
        yield pool


def parent_of(pid):
    """0 where there is no such process, or only its exit status is left."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):  # the second: it went between opening and reading
        return 0
    return 0 if state == "Z" else int(parent)


def rewards(pool, jobs):
    return [score.reward for score in pool.score(jobs)]


def worker_pids(pool):
    """Ask until both workers have answered; each job takes a moment, so that one worker cannot take them all."""
    pids = set()
    wait_until(lambda: len(pids.update(map(int, rewards(pool, [job("", "pid")] * 64))) or pids) == 2)
    assert len(pids) == 2
    return pids


def wait_until(condition, *, limit_s=5.0):
    start = time.monotonic()
    while not condition() and time.monotonic() - start < limit_s:
        time.sleep(0.02)
    return condition()


def test_order_is_kept(pool):
    jobs = [job(str(i), str(i % 7)) for i in range(1000)]
    assert rewards(pool, jobs) == [float(i == i % 7) for i in range(1000)]


@pytest.mark.parametrize("num_jobs", [0, 1, 2, 3, 257])
def test_any_number_of_jobs(pool, num_jobs):
    assert pool.score([GOOD] * num_jobs) == [CORRECT] * num_jobs


def test_pool_agrees_with_the_task_itself():
    jobs = [job("12", f"#### {i}" if i % 3 else "nothing", "word_problems") for i in range(100)]
    with ScoringPool(["word_problems"], num_workers=1, timeout_s=5) as pool:
        assert pool.score(jobs) == [TASKS["word_problems"].score(*job[:2]) for job in jobs]


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("sleep 60", "timeout"),
        ("hold", "timeout"),
        ("raise no luck", "crash: RuntimeError: no luck"),
        ("quit", "crash: SystemExit: 3"),
        ("memory", "crash: MemoryError: "),
        ("none", "crash: TypeError: the reward is a NoneType, not a number"),
        ("nan", "crash: ValueError: the reward is not finite"),
        ("text 1", "crash: TypeError: the reward is a str, not a number"),
        ("exit 3", "crash: the worker exited with status 3"),
        ("kill 9", "crash: the worker was killed by SIGKILL"),
        ("kill 11", "crash: the worker was killed by SIGSEGV"),
        ("kill 40", "crash: the worker was killed by signal 40"),
    ],
)
def test_failure_has_a_reason_and_touches_no_other_job(pool, response, reason):
    jobs = [GOOD] * 40
    jobs[17] = job("yes", response)
    scores = pool.score(jobs)
    assert scores[17] == Score(0.0, reason=reason, is_failure=True)
    assert scores[:17] + scores[18:] == [CORRECT] * 39


def test_endless_recursion_is_a_crash(pool):
    (score,) = pool.score([job("yes", "recurse")])
    assert score.is_failure and score.reason.startswith("crash: RecursionError")


def test_slow_job_within_the_deadline_is_scored(pool):
    """0.4 s is more than a chunk gets (0.25 s) and less than a job gets (1 s)."""
    assert [score.is_failure for score in pool.score([job("", "sleep 0.4"), GOOD, GOOD])] == [False] * 3


@pytest.mark.slow
def test_many_slow_jobs_do_not_add_up_to_a_timeout(pool):
    """A chunk of ten takes 0.5 s, twice what it may."""
    assert not any(score.is_failure for score in pool.score([job("", "sleep 0.05")] * 80))


def test_worker_gives_a_slow_chunk_back_when_its_time_is_used():
    assert 1 <= len(_score_chunk(HOW, [job("", "sleep 0.05")] * 10, 0.1)) <= 3
    assert len(_score_chunk(HOW, [job("", "sleep 0.05")] * 10, 0.0)) == 1
    assert len(_score_chunk(HOW, [GOOD] * 10, 60.0)) == 10


def test_deadline_is_kept(pool):
    start = time.monotonic()
    pool.score([job("yes", "sleep 60")])
    assert time.monotonic() - start < 2.5  # 0.25 s in the chunk, 1 s alone, up to 0.2 s of pebble's polling each


@pytest.mark.slow
def test_all_jobs_stuck_still_ends(pool):
    assert [score.reason for score in pool.score([job("yes", "sleep 60")] * 6)] == ["timeout"] * 6


@pytest.mark.slow
def test_endless_product_is_killed_although_it_holds_the_gil():
    with ScoringPool(["gsm8k"], num_workers=1, timeout_s=1.0) as pool:
        pool.score([job("1", "\\boxed{1}", "gsm8k")])
        start = time.monotonic()
        responses = ("\\boxed{\\prod_{k=1}^{10^9} k}", "\\boxed{3}", "\\boxed{9^{9^{9^9}}}")
        scores = pool.score([job("3", response, "gsm8k") for response in responses])
        assert [score.reason for score in scores] == ["timeout", "correct", "wrong"]
        assert time.monotonic() - start < 20  # deadlines, and a start of the worker after each


def test_worker_killed_between_calls_is_replaced(pool):
    before = worker_pids(pool)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(parent_of, before)))
    assert pool.score([GOOD] * 50) == [CORRECT] * 50
    assert not worker_pids(pool) & before


def test_worker_killed_long_before_the_next_call_is_replaced(pool):
    os.kill(next(iter(worker_pids(pool))), signal.SIGKILL)
    time.sleep(0.5)  # pebble has looked meanwhile, and given the pool up
    assert pool.score([GOOD] * 50) == [CORRECT] * 50


def test_fork_server_killed_is_replaced(pool):
    server = parent_of(next(iter(worker_pids(pool))))
    os.kill(server, signal.SIGKILL)
    assert wait_until(lambda: not parent_of(server))
    assert pool.score([GOOD] * 50) == [CORRECT] * 50
    assert pool.score([job("yes", "kill 9"), GOOD])[1] == CORRECT


def test_interrupt_key_does_not_reach_workers(pool):
    before = worker_pids(pool)
    for pid in before:
        os.kill(pid, signal.SIGINT)
    assert worker_pids(pool) == before


def test_workers_import_no_torch(pool):
    assert pool.score([job("", "modules torch numpy pytest")]) == [Score(0.0)]


def test_2000_cheap_scores_take_a_tenth_of_a_second():
    jobs = [
        job(str(i % 100), f"Ana 7 . Ben 7 + 5 = 12 . #### {i % 90}", "word_problems", metadata={"level": i})
        for i in range(2000)
    ]
    with ScoringPool(["word_problems"], num_workers=2, timeout_s=5) as pool:
        pool.score(jobs)
        times = []
        for _ in range(5):
            start = time.monotonic()
            pool.score(jobs)
            times.append(time.monotonic() - start)
    assert min(times) < 0.1  # 0.02 s on two idle cores; the best of five, since the cores may be busy


def test_close_is_quick_with_a_stuck_worker_and_may_be_repeated():
    pool = ScoringPool([TASK], num_workers=2, timeout_s=60)
    pool.score([GOOD])
    pids = {worker.pid for worker in pool._pool._pool_manager.worker_manager.workers.values()}
    pool._send(_JobChunk((0,), is_single=True), [job("yes", "hold")])
    time.sleep(1)  # the worker is inside the sum now, where no Python signal handler runs
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 2.5  # pebble waits 3 s before it kills a worker that ignores SIGTERM
    assert pids and not any(map(parent_of, pids))
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([GOOD])


def test_problems_of_several_tasks_are_judged_each_by_its_own():
    tasks = ["gsm8k", "word_problems", TASK]
    with ScoringPool(tasks, num_workers=2, timeout_s=5) as pool:
        jobs = [job("7", "\\boxed{7}", task) for task in tasks] * 10
        assert rewards(pool, jobs) == [1.0, 0.0, 0.0] * 10
        assert rewards(pool, [job("7", "#### 7", task) for task in tasks]) == [1.0, 1.0, 0.0]
        with pytest.raises(ValueError, match="other_task:TASK"):
            pool.score([*jobs, job("7", "7", "other_task:TASK")])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_workers": 0}, "data.num_scoring_workers"),
        ({"timeout_s": 0.0}, "data.scoring_timeout_s"),
        ({"timeout_s": float("nan")}, "data.scoring_timeout_s"),
        ({"task_names": ["gsm8k", "gsm9k"]}, "data.task"),
        ({"reward": "misbehaving_task:no_such_reward"}, "data.reward"),
    ],
)
def test_wrong_arguments_are_errors(arguments, field):
    with pytest.raises(UserError) as caught:
        ScoringPool(**({"task_names": ["gsm8k"], "num_workers": 1, "timeout_s": 1.0} | arguments))
    assert caught.value.field == field


def test_workers_that_cannot_start_are_an_error_not_a_hang(tmp_path, monkeypatch):
    (tmp_path / "unloadable_task.py").write_text(
        "from megatron_rl.tasks.word_problems import WordProblems\nTASK = WordProblems(preload=('no_such_module',))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pool = ScoringPool(["unloadable_task:TASK"], num_workers=1, timeout_s=1.0)
    with pytest.raises(RuntimeError, match="unloadable_task:TASK do not start"):
        pool.score([job("1", "1", "unloadable_task:TASK")])
    pool.close()


SCRIPT = """
import os, sys, time
print("top level", flush=True)           # no __main__ guard: workers must not run this
from megatron_rl.scoring.workers import ScoringPool
from megatron_rl.tasks.reward import Attempt
from megatron_rl.types import Problem
pool = ScoringPool(["gsm8k"], num_workers=2, timeout_s=600)
problem = Problem("id", "text", "3", task="gsm8k")
pool.score([Attempt(problem, "\\\\boxed{1}")])
print(*[w.pid for w in pool._pool._pool_manager.worker_manager.workers.values()], flush=True)
if sys.argv[1] == "stuck":
    pool.score([Attempt(problem, "\\\\boxed{\\\\prod_{k=1}^{10^9} k}")] * 2)
"""


def start_script(tmp_path, mode):
    """(process, worker pids, fork server pid) of a trainer that has scored once."""
    script = tmp_path / "trainer.py"
    script.write_text(SCRIPT)
    pipe = subprocess.PIPE
    # A shell that starts this suite in the background makes it, and so the trainer, deaf to SIGINT.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    trainer = subprocess.Popen([sys.executable, script, mode], stdout=pipe, stderr=pipe, text=True, preexec_fn=listen)
    assert trainer.stdout.readline() == "top level\n", trainer.stderr.read()
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    return trainer, workers, parent_of(workers[0])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_the_trainer_even_with_workers_that_hold_the_gil(tmp_path, how):
    trainer, workers, server = start_script(tmp_path, "stuck")
    time.sleep(1)  # both workers are inside the product now
    assert all(map(parent_of, [*workers, server])) and len(workers) == 2
    trainer.send_signal(how)
    trainer.wait(10)
    assert wait_until(lambda: not any(map(parent_of, [*workers, server])))


def test_program_that_forgets_to_close_ends_and_workers_do_not_run_it(tmp_path):
    trainer, workers, server = start_script(tmp_path, "idle")
    output, errors = trainer.communicate(timeout=10)
    assert (trainer.returncode, output, errors) == (0, "", "")
    assert wait_until(lambda: not any(map(parent_of, [*workers, server])))


def test_failed_score_travels():
    score = Score(0.0, reason="timeout", is_failure=True)
    assert pickle.loads(pickle.dumps(score)) == score
