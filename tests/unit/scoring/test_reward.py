"""A reward by import path: what it may return, what becomes of the others, and what is refused before a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.errors import UserError
from megatron_rl.rewards.correct import is_correct
from megatron_rl.scoring.reward import as_score
from megatron_rl.scoring.workers import ScoringPool
from megatron_rl.tasks.reward import Attempt, get_reward
from megatron_rl.types import Problem, Score

ROOT = Path(__file__).parents[3]
MODULE = "misbehaving_task"  # next to this file


def job(response: str, **fields: Any) -> Attempt:
    return Attempt(Problem("id", "text", "yes", task="word_problems", **fields), response)


@pytest.fixture(scope="module")
def pool() -> Iterator[ScoringPool]:
    """The task is another one: its score would find no number in any of these responses."""
    with ScoringPool(["word_problems"], reward=f"{MODULE}:reward", num_workers=1, timeout_s=1.0) as pool:
        yield pool


@pytest.mark.parametrize(("response", "correct"), [("1", 1.0), ("1.5", 1.0), ("0.99", 0.0), ("-2", 0.0), ("yes", 1.0)])
def test_a_float_is_a_score_that_is_correct_from_one_on(pool: ScoringPool, response: str, correct: float) -> None:
    (score,) = pool.score([job(response)])
    reward = 1.0 if response == "yes" else float(response)
    assert score == Score(reward, {"correct": correct}, "correct" if correct else "wrong")
    assert is_correct(score) == bool(correct) and not score.is_failure


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("raise no luck", "crash: RuntimeError: no luck"),
        ("sleep 60", "timeout"),
        ("hold", "timeout"),
        ("nan", "crash: ValueError: the reward is not finite"),
        ("inf", "crash: ValueError: the reward is not finite"),
        ("none", "crash: TypeError: the reward is a NoneType, not a number"),
        ("text 1", "crash: TypeError: the reward is a str, not a number"),
        ("kill 9", "crash: the worker was killed by SIGKILL"),
    ],
)
def test_a_failure_has_a_reason_and_touches_no_other_response(pool: ScoringPool, response: str, reason: str) -> None:
    scores = pool.score([job("1"), job(response), job("1")])
    assert scores[1] == Score(0.0, reason=reason, is_failure=True)
    assert [score.reward for score in scores] == [1.0, 0.0, 1.0]


def scores_of(name: str, *responses: str, timeout_s: float = 5.0, finish: str = "stop", **kwargs: Any) -> list[Score]:
    """What a reward says of responses to problems whose answer is ``yes``, each with columns of its own."""
    with ScoringPool(
        ["math"], reward=f"{MODULE}:{name}", num_workers=1, timeout_s=timeout_s, reward_kwargs=kwargs
    ) as pool:
        columns = {"data_source": "here", "extra_info": {"index": 0.5}, "level": 2, "other": 1}
        problem = Problem("id", "text", "yes", task="math", question="q", metadata=columns)
        return pool.score([Attempt(problem, response, finish) for response in responses])  # type: ignore[arg-type]


def test_a_reward_sees_the_whole_problem_and_may_return_a_score() -> None:
    with ScoringPool(["gsm8k"], reward=f"{MODULE}:reward_of_metadata", num_workers=1, timeout_s=5.0) as pool:
        problem = Problem("id", "text", "1", task="gsm8k", question="q", metadata={"points": {"a": 0.25, "b": 2}})
        assert pool.score([Attempt(problem, response) for response in "abc"]) == [
            Score(0.25, {"correct": 1.0}, "q"),
            Score(2, {"correct": 1.0}, "q"),
            Score(0.0, reason="crash: KeyError: 'c'", is_failure=True),
        ]


def test_a_reward_takes_what_it_names_and_returns_parts() -> None:
    right, wrong = scores_of("exact", "yes", "nope")
    assert right == Score(1.0, {"correct": 1.0, "length": 3.0}, "as asked")
    assert wrong == Score(0.0, {"correct": 0.0, "length": 4.0}, "as asked")


def test_rewards_of_verl_and_trl_work_as_they_are() -> None:
    assert scores_of("of_verl", "yes") == [Score(0.5, {"correct": 1.0}, "correct")]
    assert [score.reward for score in scores_of("of_trl", "yes", "no")] == [2.0, 0.0]


def test_a_reward_of_trl_gets_messages_where_the_prompts_are_such() -> None:
    problem = Problem("id", "", "yes", task="math", messages=({"role": "user", "content": "hi"},))
    verifier = get_reward(f"{MODULE}:of_trl_chat")
    assert verifier.call([Attempt(problem, "hi"), Attempt(problem, "ho")]) == [1.0, 0.0]


def test_further_arguments_and_cut_responses() -> None:
    assert [score.reward for score in scores_of("scaled", "3", scale=0.5)] == [1.5]
    assert [score.reward for score in scores_of("scaled", "3", finish="length", scale=0.5)] == [-1.0]


def test_of_many_at_once_the_one_to_blame_is_found() -> None:
    scores = scores_of("none_may_be", "1", "bad", "2")
    assert [score.reason for score in scores] == ["correct", "crash: ValueError: bad", "correct"]
    assert scores_of("one_too_few", "1", "2")[0].reason == "crash: ValueError: 0 results for 1 responses"


def test_async_rewards_run_at_the_same_time_and_have_the_deadline() -> None:
    responses = [*["0.3"] * 40, "60"]
    with ScoringPool(["math"], reward=f"{MODULE}:slow_one", num_workers=1, timeout_s=2.0) as pool:
        pool.score([Attempt(Problem("id", "text", "", task="math"), "0")])  # workers are up
        started = time.monotonic()
        scores = pool.score([Attempt(Problem("id", "text", "", task="math"), response) for response in responses])
    assert [score.reason for score in scores] == ["correct"] * 40 + ["timeout"]
    assert time.monotonic() - started < 0.3 * 40  # one after the other would take longer
    assert [score.reward for score in scores_of("slow_all", "1", "2")] == [1.0, 2.0]


def test_a_column_that_is_not_there_is_named() -> None:
    (score,) = scores_of("unknown_column", "1")
    assert "difficulty" in score.reason and score.is_failure


def test_numbers_of_numpy_become_plain_ones() -> None:
    found = get_reward(f"{MODULE}:numpy_reward").call([job("2")])
    assert type(as_score(found).reward) is type(as_score(Score(found)).reward) is float


@pytest.mark.parametrize(
    ("name", "kwargs", "rule"),
    [
        ("only_answer", {}, "takes answer, none of which is a response"),
        ("by_place", {}, "has arguments without a name"),
        ("one_and_many", {}, "takes answer of one response, and others of many.*answers"),
        ("exact", {"scale": 2}, "data.reward_kwargs = 'scale': is no argument of"),
        ("NotAFunction", {}, "is a type, not a function"),
        ("NUMBER", {}, "is an int, not a function"),
        ("rewards", {}, "did you mean reward"),
    ],
)
def test_what_is_no_reward_is_one_error(name: str, kwargs: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        get_reward(f"{MODULE}:{name}", kwargs)
    assert caught.value.field in ("data.reward", "data.reward_kwargs")


# ---- from the folder in which the command is given


TASK = """
from megatron_rl.tasks.word_problems import WordProblems
class Mine(WordProblems):
    name = "mine"
TASK = Mine()
"""
REWARD = """
def reward(problem, response): ...
"""
SCORE = """
import sys
sys.path = [entry for entry in sys.path if entry]  # as in a console script: no current folder
from megatron_rl.process.lifetime import see_current_folder
see_current_folder()
from megatron_rl.scoring.workers import ScoringPool
from megatron_rl.tasks.reward import Attempt
from megatron_rl.types import Problem
with ScoringPool(["my_task:TASK"], reward=sys.argv[1] or None, num_workers=1, timeout_s=5.0) as pool:
    print(pool.score([Attempt(Problem("id", "text", "7", task="my_task:TASK"), "#### 7")])[0].reward)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "half.py").write_text("def reward(problem, response): return 0.5")
    shutil.copy(ROOT / "examples/quickstart/grpo.yaml", tmp_path)  # its model and its problems are not there
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder that is not on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.task=my_task:TASK", "data.reward=my_reward:reward"), None),
        (
            ("data.task=gsm9k",),
            "error: data.task = 'gsm9k': is not a known task; there are gsm8k, math, word_problems.",
        ),
        (("data.task=my_task:TASKS",), "error: data.task = 'my_task:TASKS': is not there"),
        (("data.task=my_tusk:TASK",), "there is no module my_tusk"),
        (("data.reward=my_reward.py:reward",), None),
        (
            ("data.reward=my_reword.py:reward",),
            "error: data.reward = 'my_reword.py:reward': cannot be read (No such file",
        ),
        (("data.reward=my_reward:rewards",), "error: data.reward = 'my_reward:rewards': is not there"),
        (("data.reward=my_reward",), "error: data.reward = 'my_reward': does not read package.module:NAME"),
    ],
)
def test_check_finds_code_in_the_current_folder_and_refuses_what_is_not_there(
    folder: Path, overrides: tuple[str, ...], message: str | None
) -> None:
    script = folder / "bin" / "megatron-rl"  # a console script: its own folder is on the path, the current one is not
    script.parent.mkdir()
    script.write_text("from megatron_rl.commands.cli import main\nmain()\n")
    done = run(folder, str(script), "check", "--no-files", "grpo.yaml", *overrides)
    if message is None:
        assert done.returncode == 0, done.stderr
        assert "reward: my_reward" in done.stdout
    else:
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(("reward", "expected"), [("", "1.0"), ("half:reward", "0.5"), ("half.py:reward", "0.5")])
def test_scoring_workers_find_tasks_and_rewards_in_the_current_folder(folder: Path, reward: str, expected: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "score.py").write_text(SCORE)
    done = run(folder, "bin/score.py", reward)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


def test_what_a_reward_prints_does_not_bury_the_run(folder: Path) -> None:
    """In a process of its own: workers write where the fork server's first caller wrote."""
    (folder / "loud.py").write_text("def reward(problem, response):\n    print('very loud\\n' * 100)\n    return 0.5")
    (folder / "score.py").write_text(SCORE)
    done = run(folder, "score.py", "loud.py:reward")
    assert done.stdout == "0.5\n", done.stderr
    assert done.stderr.count("[a scoring worker prints] very loud") == 20 and "and more" in done.stderr


def test_a_fork_server_that_dies_at_its_first_start_is_replaced(folder: Path) -> None:
    (folder / "fatal.py").write_text(
        "import os, pathlib, signal\nmark = pathlib.Path('mark')\n"
        "if not mark.exists():\n    mark.touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with (folder / "my_task.py").open("a") as file:
        file.write("object.__setattr__(TASK, 'preload', ('fatal',))\n")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"}  # the fork server looks nowhere else
    command = [sys.executable, "-c", SCORE, "half:reward"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (folder / "mark").exists()
    assert (done.returncode, done.stdout) == (0, "0.5\n"), done.stderr
