import json
import random
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.tasks import get_task
from megatron_rl.tasks.problems import load_problems

DATA = Path(__file__).parents[4] / "shared" / "data"
NATALIA = {
    "question": "How many clips?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=1,072>>1,072.\n#### 1,072",
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answer_and_solution_are_taken_apart(tmp_path):
    (problem,) = load_problems("gsm8k", write(tmp_path / "a.jsonl", NATALIA))
    assert problem.answer == "1072"
    assert problem.solution == ("She sold 48/2 = 24 clips in May.\nIn all 48+24 = 1,072.\nThe answer is \\boxed{1072}.")
    assert problem.prompt.startswith("How many clips?\n") and "\\boxed{}" in problem.prompt
    assert problem.source.endswith("a.jsonl:1")


def test_problem_id_depends_on_the_question_only(tmp_path):
    (here,) = load_problems("gsm8k", write(tmp_path / "a.jsonl", NATALIA))
    (there,) = load_problems("gsm8k", write(tmp_path / "b.jsonl", NATALIA), template="Q: {question}")
    (other,) = load_problems("gsm8k", write(tmp_path / "c.jsonl", NATALIA | {"question": "How many?"}))
    assert here.problem_id == there.problem_id != other.problem_id


@pytest.mark.parametrize("answer", ["72", "#### six", "####", "#### 7 2", "#### 1,23", "#### 72\n#### ", "#### 72 m"])
def test_answer_without_final_number_is_an_error(tmp_path, answer):
    path = write(tmp_path / "a.jsonl", NATALIA, {"question": "q", "answer": answer})
    with pytest.raises(UserError, match=r"must end in #### and a number") as caught:
        load_problems("gsm8k", path)
    assert caught.value.field == f"{path}:2"


def real_problems():
    files = [DATA / "gsm8k_train.jsonl", DATA / "gsm8k_test.jsonl"]
    if not all(file.exists() for file in files):
        pytest.skip(f"needs the published data set at {DATA}")
    return [problem for file in files for problem in load_problems("gsm8k", file)]


def check_references(problems):
    task = get_task("gsm8k")
    for problem in problems:
        assert task.score(problem, problem.solution).reward == 1.0, problem
        assert task.score(problem, problem.solution.replace("\\boxed{", "\\boxed{1")).reward == 0.0, problem


def test_published_files_load_whole():
    problems = real_problems()
    assert len(problems) == 7473 + 1319
    assert len({problem.problem_id for problem in problems}) == len(problems)
    assert not any("<<" in problem.solution or "####" in problem.solution for problem in problems)


def test_published_solutions_earn_the_reward_and_wrong_ones_do_not():
    check_references(random.Random(0).sample(real_problems(), 200))


def test_published_solutions_without_a_box_state_their_answer():
    problems = random.Random(1).sample(real_problems(), 200)
    task = get_task("gsm8k")
    for problem in problems:
        assert (
            task.score(problem, f"{problem.solution.partition('The answer is')[0]}#### {problem.answer}").reward == 1.0
        )
        assert task.score(problem, problem.solution.replace("\\boxed{", "").replace("}.", ".")).parts["format"] == 1.0


def test_published_solutions_without_a_mark_are_understood_if_lenient():
    """Not all: math-verify takes the last formula in dollars for the answer where one stands there."""
    problems = random.Random(1).sample(real_problems(), 200)
    texts = [problem.solution.replace("The answer is \\boxed{", "Thus ").replace("}.", ".") for problem in problems]
    task = get_task("gsm8k")
    lenient = [task.score(problem, text, lenient=True) for problem, text in zip(problems, texts)]
    assert sum(score.reward for score in lenient) >= 195
    assert not any(score.parts["format"] for score in lenient)
    assert not any(task.score(problem, text).reward for problem, text in zip(problems, texts))


@pytest.mark.slow
def test_all_published_solutions_earn_the_reward():
    check_references(real_problems())
