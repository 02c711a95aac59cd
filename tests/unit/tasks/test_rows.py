"""Problem files of every form as rows: JSON, parquet, folders; slices and lists of them; what is wrong with them."""

from __future__ import annotations

import datetime
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.errors import UserError
from megatron_rl.tasks.rows.content import rows_digest
from megatron_rl.tasks.rows.copy import copy_rows
from megatron_rl.tasks.rows.layouts import read_example
from megatron_rl.tasks.rows.open import first_row, open_rows
from megatron_rl.tasks.rows.row import Fields, Row
from megatron_rl.tasks.rows.spec import parse_spec

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


def read(*texts: object) -> list[tuple[str, dict[str, Any]]]:
    """All rows: where they stand, and what is in them."""
    return [(row.source, dict(row.values)) for row in open_rows(list(map(str, texts)), field="data.train")]


def used(path: Path) -> list[Any]:
    """What a task takes of each row."""
    rows = open_rows([str(path)], field="data.train")
    return [(row.text("question"), row.text("answer"), row.optional_text("solution")) for row in rows]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_one_error_that_names_the_line(tmp_path: Path, name: str) -> None:
    content, line, rule = MALFORMED[name]
    path = tmp_path / "problems.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        used(path)
    assert caught.value.field == (f"{path}:{line}" if line else str(path))
    assert rule in caught.value.rule
    assert caught.value.fix
    assert len(str(caught.value)) < 500 + 2 * len(str(path))


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("absent.jsonl", None, "is no file or folder here"),
        ("problems.csv", GOOD, "must end in .jsonl, .jsonl.gz, .json, .parquet"),
        ("problems.jsonl.gz", GOOD, "is not whole gzip data"),
        ("problems.jsonl.gz", gzip.compress(GOOD * 1000)[:-20], "is not whole gzip data"),
        ("problems.parquet", GOOD, "cannot be read"),
        ("problems.parquet", b"", "cannot be read"),
        ("problems.json", b'{"a": 1, "b":\n 2}', "is not an array of rows"),
        ("problems.json", b"[1, 2", "is not JSON"),
        ("problems.json", b"[1, 2]", "is not a JSON object"),
        ("problems.json", b"[]", "has no row"),
        ("d.jsonl", "folder", "holds no problem file"),
    ],
)
def test_unreadable_file_is_an_error(tmp_path: Path, name: str, content: Any, rule: str) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rule):
        read(path)
    if content is not None and content != "folder":  # in the first second, too
        with pytest.raises(UserError, match=rule):
            first_row(parse_spec(str(path), "data.train"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_blank_lines_at_the_end_extra_fields_and_byte_order_mark_are_fine(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + GOOD + b'\r\n{"question": "r", "answer": "2", "solution": null, "level": 5}\n\n   \n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert used(path) == [("q", "1", None), ("r", "2", None)]
    assert read(path)[1] == (f"{path}:2", {"question": "r", "answer": "2", "solution": None, "level": 5})


ROWS = [
    {"id": number, "prompt": [{"role": "user", "content": f"é {number}"}], "reward": {"truth": str(number)}}
    for number in range(7)
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write rows in the form that the file's name says."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif path.name == "splits":
        found = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": found, "test": found.select([0])}).save_to_disk(path)
    elif path.name == "folder":
        write(path / "train.parquet", rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


FORMS = ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "saved", "splits", "folder"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / form)
    assert [values for _, values in read(path)] == ROWS
    rows = open_rows([str(path)], field="data.train")
    assert [dict(rows[index].values) for index in (6, 0, 3)] == [ROWS[6], ROWS[0], ROWS[3]]  # in any order
    with pytest.raises(IndexError):
        rows[7]


def test_an_object_a_line_may_be_called_json_and_columns_are_taken(tmp_path: Path) -> None:
    lines, columns = tmp_path / "lines.json", tmp_path / "columns.json"
    lines.write_text('{"a": 1}\n{"a": 2}\n')
    columns.write_text(json.dumps({"a": [1, 2], "b": ["x", "y"]}))
    assert [values for _, values in read(lines)] == [{"a": 1}, {"a": 2}]
    assert [values for _, values in read(columns)] == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


@pytest.mark.parametrize(
    ("cut", "numbers"), [("[2:5]", [2, 3, 4]), ("[:2]", [0, 1]), ("[-2:]", [5, 6]), ("[5:100]", [5, 6])]
)
@pytest.mark.parametrize("form", ["a.jsonl", "a.parquet"])
def test_a_slice_of_a_file(tmp_path: Path, form: str, cut: str, numbers: list[int]) -> None:
    found = read(f"{write(tmp_path / form)}{cut}")
    assert [values["id"] for _, values in found] == numbers
    source = f"{tmp_path / form}:{numbers[0] + 1}" if form == "a.jsonl" else f"{tmp_path / form} row {numbers[0]}"
    assert found[0][0] == source  # counted in the whole file


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.parquet", ROWS[2:])
    rows = open_rows([str(first), str(second)], field="data.train")
    assert [row.values["id"] for row in rows] == [rows[index].values["id"] for index in range(7)] == list(range(7))


def test_a_slice_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train = .*\[7:9\]': takes no row"):
        read(f"{write(tmp_path / 'a.jsonl')}[7:9]")


def test_a_file_whose_name_has_brackets_is_that_file(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "a[1:2].jsonl"))) == 7


def test_values_that_json_has_not_become_such(tmp_path: Path) -> None:
    day, image = datetime.date(2026, 11, 29), b"\x89PNG"
    (row,) = read(write(tmp_path / "a.parquet", [{"day": day, "image": image, "size": 1.5, "none": None}]))
    assert row[1] == {"day": "2026-11-29", "image": None, "size": 1.5, "none": None}


def test_a_set_on_the_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the libraries read the variable when they are imported."""
    program = (
        "from megatron_rl.tasks.rows.open import open_rows\nfrom megatron_rl.errors import UserError\n"
        "try:\n    open_rows(['nobody/nothing:main:train[:5]'], field='data.train')\n"
        "except UserError as error:\n    print(error)"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    said = done.stdout.strip()
    assert (
        said.startswith("data.train = 'nobody/nothing:main:train[:5]': is no file or folder here") and "\n" not in said
    )
    assert "hf download --repo-type dataset nobody/nothing --local-dir FOLDER" in said


def test_splits_are_chosen_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path / "odd" / "saved")
    (tmp_path / "odd" / "saved").rename(tmp_path / "odd" / "one")
    write(tmp_path / "odd" / "saved")
    (tmp_path / "odd" / "saved").rename(tmp_path / "odd" / "two")
    (tmp_path / "odd" / "dataset_dict.json").write_text('{"splits": ["one", "two"]}')
    with pytest.raises(UserError, match=r"data\.train = .*has the splits one, two, not train"):
        read(tmp_path / "odd")
    write(tmp_path / "splits")
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert len(read(tmp_path / "splits")) == 1  # the only one
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert len(open_rows([str(tmp_path / "splits")], field="data.validation", split="test")) == 1


@pytest.mark.parametrize("form", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_chosen_rows_are_copied(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / form)
    sources = {source for source, values in read(path) if values["id"] in (1, 4)}
    copy_rows([str(path)], sources, tmp_path / "some.jsonl", field="data.train")
    assert [values for _, values in read(tmp_path / "some.jsonl")] == [ROWS[1], ROWS[4]]


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    other = write(tmp_path / "c.jsonl", ROWS[1:])
    assert rows_digest([str(first)]) == rows_digest([str(second)]) != rows_digest([str(other)])
    assert rows_digest([f"{first}[:3]"]) != rows_digest([str(first)])


def test_tools_that_are_no_json_are_named(tmp_path: Path) -> None:
    fields = Fields(question="question", tools="tools")
    row = Row("f:3", {"question": "q", "tools": "[{'name': 1}]"}, fields)
    with pytest.raises(UserError, match=r"f:3 = .*: column 'tools' is not JSON"):
        read_example(row)


def test_a_demonstration_in_parts_is_a_text() -> None:
    def row(*parts: dict[str, str]) -> Row:
        turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": list(parts)}]
        return Row("f:1", {"messages": turns}, Fields(prompt="messages"))

    spoken = [{"type": "text", "text": "It is "}, {"type": "text", "text": "4."}]
    assert read_example(row(*spoken)).solution == "It is 4."
    with pytest.raises(UserError, match=r"f:1 = .*the last turn of the assistant has parts that are no text"):
        read_example(row({"type": "image", "image": "cat.png"}))
