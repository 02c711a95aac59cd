"""Problems of files: what every task keeps of a row, repeated ones, templates, layouts, many rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.errors import UserError
from megatron_rl.tasks import TASKS, get_task
from megatron_rl.tasks import problems as problem_files
from megatron_rl.tasks.base import Task, fill_template, unique_problems
from megatron_rl.tasks.problems import Problems, check_answer, load_problems, open_problems
from megatron_rl.tasks.reward import Attempt, as_verifier
from megatron_rl.tasks.rows.row import Fields
from megatron_rl.types import Problem


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(task: str) -> dict[str, Any]:
    """A row that the task reads."""
    return {"question": "q", "answer": "#### 1" if task == "gsm8k" else "1", "level": 5, "tests": [{"in": "2"}]}


@pytest.mark.parametrize("name", TASKS)
def test_problems_carry_the_name_of_their_task_the_question_and_the_rest_of_the_row(tmp_path: Path, name: str) -> None:
    (problem,) = load_problems(name, write(tmp_path / "a.jsonl", plain(name)), template="<{question}>")
    assert (problem.task, problem.question, problem.prompt, problem.answer) == (name, "q", "<q>", "1")
    assert problem.metadata == {"level": 5, "tests": [{"in": "2"}]}
    assert problem.source == f"{tmp_path}/a.jsonl:1"


def test_repeated_problem_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    problems = [Problem("a", "p", "1", source="f:1"), Problem("b", "q", "2"), Problem("a", "p", "1", source="f:3")]
    assert [p.source for p in unique_problems(problems)] == ["f:1", ""]
    assert "1 problems repeat" in caplog.text


def test_one_question_with_two_answers_is_an_error_that_names_both_lines() -> None:
    problems = [Problem("a", "p", "1", source="f:1"), Problem("a", "p", "2", source="f:3")]
    with pytest.raises(UserError, match=r"f:3 = '2': answers the question of f:1, where the answer is '1'"):
        unique_problems(problems)


def test_template_keeps_its_other_braces() -> None:
    assert fill_template("{question} in \\boxed{}", "1 {x}?") == "1 {x}? in \\boxed{}"


@pytest.mark.parametrize("task", TASKS)
def test_template_without_question_is_an_error(tmp_path: Path, task: str) -> None:
    path = write(tmp_path / "a.jsonl", plain(task))
    with pytest.raises(UserError, match=r"data\.template = 'Solve': must contain \{question\}"):
        load_problems(task, path, template="Solve")


def test_tasks_are_listed_under_their_names() -> None:
    assert all(isinstance(task, Task) and task.name == name for name, task in TASKS.items())


def test_reading_problems_imports_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", plain("math"))
    program = (
        "import sys\nfrom megatron_rl.tasks.problems import load_problems\n"
        f"assert load_problems('math', {str(path)!r})\nprint('torch' in sys.modules, 'datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# ---- layouts


USER, SYSTEM = {"role": "user", "content": "2 + 2?"}, {"role": "system", "content": "be brief"}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (row, what the problem must be)
    "verl": (
        {"data_source": "gsm8k", "prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "4"},
         "extra_info": {"index": 3}},
        {"messages": (USER,), "answer": "4",
         "metadata": {"data_source": "gsm8k", "extra_info": {"index": 3},
                      "reward_model": {"style": "rule", "ground_truth": "4"}}},
    ),
    "verl, nested values as JSON": (
        {"prompt": [SYSTEM, USER], "reward_model": '{"ground_truth": 4}'},
        {"messages": (SYSTEM, USER), "answer": "4", "metadata": {"reward_model": '{"ground_truth": 4}'}},
    ),
    "SkyRL": (
        {"prompt": [USER], "reward_spec": {"ground_truth": "4"}},
        {"messages": (USER,), "answer": "4", "metadata": {"reward_spec": {"ground_truth": "4"}}},
    ),
    "DAPO-Math-17k-Processed": (
        {"prompt": "2 + 2?", "solution": "4", "source_prompt": [USER], "reward_model": {"ground_truth": "4"}},
        {"messages": (USER,), "answer": "4",
         "metadata": {"prompt": "2 + 2?", "solution": "4", "reward_model": {"ground_truth": "4"}}},
    ),
    "slime": (
        {"prompt": [USER], "label": "4", "id": 7},
        {"messages": (USER,), "answer": "4", "metadata": {"label": "4", "id": 7}},
    ),
    "slime, texts": ({"prompt": "2 + 2?", "label": 4}, {"prompt": "2 + 2?", "answer": "4", "question": ""}),
    "NeMo-RL": ({"input": "2 + 2?", "output": "4"}, {"question": "2 + 2?", "answer": "4"}),
    "NeMo-RL, OpenMathInstruct": (
        {"problem": "2 + 2?", "generated_solution": "It is 4.", "expected_answer": "4"},
        {"question": "2 + 2?", "answer": "4", "solution": "It is 4."},
    ),
    "TRL": (
        {"prompt": [USER], "solution": "$4$"}, {"messages": (USER,), "answer": "4", "metadata": {"solution": "$4$"}}
    ),
    "TRL, prompt and completion": (
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "It is \\boxed{4}."}]},
        {"messages": (USER,), "answer": "4", "solution": "It is \\boxed{4}."},
    ),
    "OpenRLHF": ({"input": "2 + 2?", "label": "4"}, {"question": "2 + 2?", "answer": "4"}),
    "OpenRLHF, messages": ({"context_messages": [USER]}, {"messages": (USER,), "answer": ""}),
    "chat messages": (
        {"messages": [USER, {"role": "assistant", "content": "So \\boxed{4}"}]},
        {"messages": (USER,), "answer": "4", "solution": "So \\boxed{4}"},
    ),
    "GSM8K": (
        {"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"},
        {"question": "2 + 2?", "answer": "4", "solution": "It is 4.\nThe answer is \\boxed{4}."},
    ),
    "MATH": (
        {"problem": "2 + 2?", "solution": "It is $\\boxed{4}$.", "level": "Level 1"},
        {"question": "2 + 2?", "answer": "4", "solution": "It is $\\boxed{4}$.",
         "metadata": {"solution": "It is $\\boxed{4}$.", "level": "Level 1"}},
    ),
    "AIME": ({"ID": "2024-I-1", "Problem": "2 + 2?", "Answer": 204}, {"question": "2 + 2?", "answer": "204"}),
    "OlympiadBench": ({"question": "2 + 2?", "final_answer": ["$4$"]}, {"question": "2 + 2?", "answer": "4"}),
    "prompts alone": ({"prompt": "2 + 2?"}, {"prompt": "2 + 2?", "answer": ""}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_said(tmp_path: Path, name: str) -> None:
    row, expected = LAYOUTS[name]
    said: list[str] = []
    path = write(tmp_path / "a.jsonl", row)
    (problem,) = open_problems("math", [str(path)], say=said.append)
    assert {field: getattr(problem, field) for field in expected} == expected
    assert len(said) == 1 and said[0].startswith("data.train: layout of ")


@pytest.mark.parametrize("column", ["solution", "ground_truth", "label"])
def test_a_reward_may_ask_for_the_answer_by_the_name_of_its_column(tmp_path: Path, column: str) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[bool]:
        return [given == completion for given, completion in zip(kwargs[column], completions)]

    problems = load_problems("math", write(tmp_path / "a.jsonl", {"prompt": "q", column: "4"}))
    verifier = as_verifier(reward, "my.py:reward", {})
    assert verifier.call([Attempt(problems[0], "4"), Attempt(problems[0], "5")]) == [True, False]


def test_columns_of_ones_own_are_mapped(tmp_path: Path) -> None:
    row = {"task": {"text": "2 + 2?"}, "gold": 4, "steps": "It is 4.", "more": {"level": 1}, "other": 2}
    fields = Fields(question="task.text", answer="gold", solution="steps", metadata="more")
    (problem,) = load_problems("math", write(tmp_path / "a.jsonl", row), fields=fields)
    assert (problem.question, problem.answer, problem.solution) == ("2 + 2?", "4", "It is 4.")
    assert problem.metadata == {"level": 1}


@pytest.mark.parametrize(
    ("rows", "fields", "where", "rule"),
    [
        ([{"questoin": "q", "answer": "1"}], None, ":1", "has the columns of no layout that is known"),
        ([{"questoin": "q", "answer": "1"}], {"question": "question"}, ":1", "has no field 'question'"),
        ([{"prompt": [SYSTEM], "label": "1"}], None, ":1", "has no user's turn to answer"),
        ([{"prompt": [], "label": "1"}], None, ":1", "has no user's turn to answer"),
        ([{"prompt": [{"content": "q"}], "label": "1"}], None, ":1", "message 0 has no role"),
        ([{"prompt": [{"role": "human", "content": "q"}], "label": "1"}], None, ":1", "message 0 is of none of system"),
        ([{"prompt": 3, "label": "1"}], None, ":1", "column 'prompt' is no text"),
        ([{"prompt": "q", "label": "1"}, {"prompt": "r"}], None, ":2", "has no field 'label'"),
        ([{"prompt": "q", "label": "1"}, {"prompt": " ", "label": "1"}], None, ":2", "column 'prompt' is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_columns_is_named(
    tmp_path: Path, rows: list[dict[str, Any]], fields: dict[str, str] | None, where: str, rule: str
) -> None:
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError) as caught:
        load_problems("math", path, fields=Fields(**(fields or {})))
    assert caught.value.field == f"{path}{where}" and rule in caught.value.rule


def test_a_near_name_is_offered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean questoin"):
        load_problems("math", write(tmp_path / "a.jsonl", {"questoin": "q"}), fields=Fields(question="question"))


def test_files_of_two_layouts_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"prompt": "q", "label": "1"})
    second = write(tmp_path / "b.jsonl", {"question": "q", "answer": "1"})
    with pytest.raises(UserError, match=r"b\.jsonl': has the layout 'question and answer' .* has 'slime'"):
        load_problems("math", first, second)


def test_a_template_does_not_go_around_a_whole_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "q", "label": "1"})
    with pytest.raises(UserError, match=r"data\.template = .*has a whole prompt"):
        load_problems("math", path, template="<{question}>")


def test_an_answer_has_to_be_there_where_it_is_compared_with(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "q"})
    (problem,) = open_problems("math", [str(path)])
    with pytest.raises(UserError, match=r"a\.jsonl:1: has no reference answer"):
        check_answer(problem)


def test_of_many_rows_each_is_read_when_its_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_files, "MAX_LOADED", 2)
    rows = [{"prompt": f"q{number}", "label": str(number)} for number in range(3)]
    path = write(tmp_path / "a.jsonl", *rows, {"prompt": "q4"})
    problems = open_problems("math", [str(path)])
    assert isinstance(problems, Problems) and len(problems) == 4  # the last row's fault is not found yet
    assert [problems[index].answer for index in (2, 0)] == ["2", "0"]
    with pytest.raises(UserError, match=r"a\.jsonl:4"):
        problems[3]


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("no_such_module:TASK", "cannot be imported"),
        ("megatron_rl.tasks:NO_SUCH_TASK", "has no NO_SUCH_TASK"),
        (":TASK", "does not read package.module:NAME"),
        ("megatron_rl.tasks.gsm8k:Gsm8k", "is not an object with"),
        ("megatron_rl.tasks.gsm8k:TEMPLATE", "is not an object with"),
    ],
)
def test_wrong_import_path_is_an_error(path: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        get_task(path)


def test_tasks_and_scoring_import_no_torch() -> None:
    code = (
        "import sys, megatron_rl.tasks as t, megatron_rl.scoring.workers\n"
        "from megatron_rl.types import Problem\n"
        "assert all(task.score(Problem('', '', '1'), '#### 1').reward == 1 for task in t.TASKS.values())\n"
        "assert t.get_task('gsm8k').score(Problem('', '', '1/2'), '\\\\boxed{\\\\sqrt{4}/4}').reward == 1\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
