import gzip
import json
import subprocess
import sys

import pytest

from megatron_rl.errors import UserError
from megatron_rl.tasks import TASKS, get_task, load_problems
from megatron_rl.tasks.base import Task, fill_template, unique_problems
from megatron_rl.tasks.jsonl import read_rows
from megatron_rl.types import Problem

GOOD = b'{"question": "q", "answer": "1"}'

MALFORMED = {  # name -> (bytes of the file, line that the error must name, words that it must say)
    "empty file": (b"", None, "has no row"),
    "blank lines only": (b"\n  \n\n", None, "has no row"),
    "not json": (b"question: q\n", 1, "is not JSON"),
    "cut line": (GOOD + b'\n{"question": "q", "ans', 2, "is not JSON"),
    "two objects on a line": (GOOD + GOOD, 1, "is not JSON"),
    "array file": (b"[" + GOOD + b"]", 1, "is not a JSON object"),
    "bare string": (b'"q"\n', 1, "is not a JSON object"),
    "bare number": (GOOD + b"\n7\n", 2, "is not a JSON object"),
    "blank line between rows": (GOOD + b"\n\n" + GOOD, 2, "is an empty line"),
    "blank lines at the start": (b"\n \n" + GOOD, 1, "is an empty line"),
    "null row": (b"null\n", 1, "is not a JSON object"),
    "missing field": (b'{"question": "q"}\n', 1, "has no field 'answer'"),
    "misspelt field": (b'{"Question": "q", "answer": "1"}\n', 1, "has no field 'question'"),
    "empty object": (GOOD + b"\n{}\n", 2, "has no field 'question'"),
    "number for a string": (b'{"question": "q", "answer": 1}\n', 1, "field 'answer' must be a string"),
    "null for a string": (b'{"question": null, "answer": "1"}\n', 1, "field 'question' must be a string"),
    "list for a string": (b'{"question": ["q"], "answer": "1"}\n', 1, "field 'question' must be a string"),
    "empty string": (b'{"question": "", "answer": "1"}\n', 1, "field 'question' is empty"),
    "spaces only": (GOOD + b'\n{"question": "q", "answer": " \\n"}\n', 2, "field 'answer' is empty"),
    "key twice": (b'{"question": "a", "question": "b", "answer": "1"}\n', 1, "occurs twice"),
    "not utf-8": (GOOD + b"\n" + '{"question": "é", "answer": "1"}'.encode("latin-1"), 2, "is not UTF-8"),
    "half a surrogate pair": (b'{"question": "\\ud800", "answer": "1"}\n', 1, "half a surrogate pair"),
    "deep nesting": (b'{"question": ' + b"[" * 100_000, 1, "is not JSON"),
    "endless integer": (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", 1, "is not JSON"),
    "non-string optional field": (GOOD[:-1] + b', "solution": 3}', 1, "field 'solution' must be a string"),
}


def rows(path):
    return list(read_rows(path, required=("question", "answer"), optional=("solution",)))


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_one_error_that_names_the_line(tmp_path, name):
    content, line, rule = MALFORMED[name]
    path = tmp_path / "problems.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        rows(path)
    assert caught.value.field == (f"{path}:{line}" if line else str(path))
    assert rule in caught.value.rule
    assert caught.value.fix
    assert len(str(caught.value)) < 500 + 2 * len(str(path))


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("absent.jsonl", None, "cannot be read"),
        ("problems.json", GOOD, "must be a .jsonl or .jsonl.gz file"),
        ("problems.jsonl.gz", GOOD, "is not whole gzip data"),
        ("problems.jsonl.gz", gzip.compress(GOOD * 1000)[:-20], "is not whole gzip data"),
    ],
)
def test_unreadable_file_is_an_error(tmp_path, name, content, rule):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rule):
        rows(tmp_path / name)


def test_directory_is_an_error(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        rows(tmp_path / "d.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_blank_lines_at_the_end_extra_fields_and_byte_order_mark_are_fine(tmp_path, name):
    content = b"\xef\xbb\xbf" + GOOD + b'\r\n{"question": "r", "answer": "2", "solution": null, "level": 5}\n\n   \n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert rows(tmp_path / name) == [
        (f"{tmp_path / name}:1", {"question": "q", "answer": "1"}, {}),
        (f"{tmp_path / name}:2", {"question": "r", "answer": "2"}, {"level": 5}),
    ]


@pytest.mark.parametrize("name", TASKS)
def test_problems_carry_the_name_of_their_task_the_question_and_the_rest_of_the_row(tmp_path, name):
    row = {"question": "q", "answer": "#### 1" if name == "gsm8k" else "1", "level": 5, "tests": [{"in": "2"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (problem,) = load_problems(name, tmp_path / "a.jsonl", template="<{question}>")
    assert (problem.task, problem.question, problem.prompt) == (name, "q", "<q>")
    assert problem.metadata == {"level": 5, "tests": [{"in": "2"}]}


def test_repeated_problem_is_left_out_and_counted(caplog):
    problems = [Problem("a", "p", "1", source="f:1"), Problem("b", "q", "2"), Problem("a", "p", "1", source="f:3")]
    assert [p.source for p in unique_problems(problems)] == ["f:1", ""]
    assert "1 problems repeat" in caplog.text


def test_one_question_with_two_answers_is_an_error_that_names_both_lines():
    problems = [Problem("a", "p", "1", source="f:1"), Problem("a", "p", "2", source="f:3")]
    with pytest.raises(UserError, match=r"f:3 = '2': answers the question of f:1, where the answer is '1'"):
        unique_problems(problems)


def test_template_keeps_its_other_braces():
    assert fill_template("{question} in \\boxed{}", "1 {x}?") == "1 {x}? in \\boxed{}"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_template_without_question_is_an_error(tmp_path, task):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "#### 1" if task.name == "gsm8k" else "1"}))
    with pytest.raises(UserError, match=r"data\.template = 'Solve': must contain \{question\}"):
        task.load(path, template="Solve")
    assert task.load(path, template="<{question}>")[0].prompt == "<q>"


def test_tasks_are_listed_under_their_names():
    assert all(isinstance(task, Task) and task.name == name for name, task in TASKS.items())


def test_unknown_task_lists_the_names():
    with pytest.raises(UserError, match="gsm8k, word_problems"):
        get_task("gms8k")


def test_task_outside_the_package_is_found_by_import_path(tmp_path, monkeypatch):
    source = "from megatron_rl.tasks.gsm8k import Gsm8k\nTASK = Gsm8k(name='outside')\n"
    (tmp_path / "outside_task.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert get_task("outside_task:TASK").name == "outside"


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
def test_wrong_import_path_is_an_error(path, rule):
    with pytest.raises(UserError, match=rule):
        get_task(path)


def test_tasks_and_scoring_import_no_torch():
    code = (
        "import sys, megatron_rl.tasks as t, megatron_rl.scoring.workers\n"
        "from megatron_rl.types import Problem\n"
        "assert all(task.score(Problem('', '', '1'), '#### 1').reward == 1 for task in t.TASKS.values())\n"
        "assert t.get_task('gsm8k').score(Problem('', '', '1/2'), '\\\\boxed{\\\\sqrt{4}/4}').reward == 1\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
