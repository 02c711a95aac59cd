import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from examples.five_styles.task import (
    TAGS,
    TASK,
    VOCABULARY,
    Errors,
    Shares,
    generate,
    shares_by_style,
    style_of,
    write_solution,
)
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.errors import UserError
from megatron_rl.tasks.problems import load_problems
from megatron_rl.tasks.word_problems import HASH_CLASSES, Chain, Step
from megatron_rl.tasks.word_tokenizer import ModelSize, save_model
from megatron_rl.types import Problem

REPOSITORY = Path(__file__).parents[3]
APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
UNDO = {"+": "-", "-": "+", "/": "*"}

CHAIN = Chain(17, (Step("+", 5), Step("-", 3), Step("*", 2)))
SOLUTIONS = {
    "forward": "forward 17 + 5 = 22 . 22 - 3 = 19 . 19 * 2 = 38 . #### 38",
    "backward": "backward * 2 - 3 + 5 from 17 : 22 : 19 : 38 . #### 38",
    "split": "split units 7 tens 1 . + 5 units 2 tens 2 . - 3 units 9 tens 1 . * 2 units 8 tens 3 . #### 38",
    "table": "table 17 : 22 : 19 : 38 . #### 38",
    "check": "check 22 - 5 = 17 . 19 + 3 = 22 . 38 / 2 = 19 . #### 38",
}


def read_question(question):
    """(start, operations): an independent reading."""
    _, start, *rest = question.removesuffix(" ?").split()
    return int(start), list(zip(rest[::2], map(int, rest[1::2])))


def right_values(question):
    start, operations = read_question(question)
    values = [start]
    for sign, number in operations:
        values.append(APPLY[sign](values[-1], number))
    return values


def read_solution(row):
    """The values that a solution states, start first, by splitting words; it checks all else that the solution says."""
    tag, *words = row["solution"].split()
    start, operations = read_question(row["question"])
    body, (mark, final) = words[:-2], words[-2:]
    sentences = [part.split() for part in " ".join(body).removesuffix(" .").split(" . ")]
    if tag == "forward":
        assert [(w[1], int(w[2])) for w in sentences] == operations and all(w[3] == "=" for w in sentences)
        assert all(before[4] == after[0] for before, after in pairwise(sentences))
        values = [int(sentences[0][0]), *(int(w[4]) for w in sentences)]
    elif tag == "check":
        assert [(UNDO[w[1]], int(w[2])) for w in sentences] == operations and all(w[3] == "=" for w in sentences)
        assert all(before[0] == after[4] for before, after in pairwise(sentences))
        values = [int(sentences[0][4]), *(int(w[0]) for w in sentences)]
    elif tag == "split":
        assert [(w[0], int(w[1])) for w in sentences[1:]] == operations
        assert all((w[-4], w[-2]) == ("units", "tens") for w in sentences)
        values = [10 * int(w[-1]) + int(w[-3]) for w in sentences]
    elif tag == "backward":
        stated = sentences[0].index("from")
        listed = sentences[0][:stated]
        assert list(zip(listed[::2], map(int, listed[1::2]))) == operations[::-1]
        values = [int(w) for w in sentences[0][stated + 1 :] if w != ":"]
    else:
        values = [int(w) for w in sentences[0] if w != ":"]
    assert tag == row["style"] and mark == "####" and final == str(values[-1])
    assert values[0] == start and len(values) == len(operations) + 1
    return values


def stated_steps(row):
    """(index, right result, stated result) of each step, from the value that the solution itself states before it."""
    values, (_, operations) = read_solution(row), read_question(row["question"])
    for index, ((sign, number), before, after) in enumerate(zip(operations, values, values[1:])):
        yield index, APPLY[sign](before, number), after


def near(share, count):
    """Within four standard errors."""
    return pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def score(answer, response):
    return TASK.score(Problem("id", "text", answer), response)


@pytest.mark.parametrize("tag", TAGS)
def test_example_in_each_style(tag):
    assert write_solution(tag, CHAIN, [17, 22, 19, 38]) == SOLUTIONS[tag]
    judged = score("38", SOLUTIONS[tag])
    assert (judged.reward, judged.parts, judged.answer, judged.style) == (
        1.0,
        {"correct": 1.0, "format": 1.0},
        "38",
        tag,
    )


def test_solutions_without_errors_score_in_their_style_and_state_right_values():
    for row in generate(3000, seed=3):
        values = right_values(row["question"])
        assert row["answer"] == str(values[-1]) and all(0 <= value <= 99 for value in values)
        assert read_solution(row) == values and row["num_wrong_steps"] == 0
        assert row["num_operations"] == len(values) - 1
        judged = score(row["answer"], row["solution"])
        assert (judged.reward, judged.style) == (1.0, row["style"])


def test_wrong_answer_scores_zero_and_keeps_its_style():
    for row in generate(500, seed=4, errors=Errors(shares_by_style(blind=1.0))):
        wrong = score(str(int(row["answer"]) + 1), row["solution"])
        if row["num_wrong_steps"]:
            wrong = score(row["answer"], row["solution"])
        assert (wrong.reward, wrong.reason, wrong.style) == (0.0, "wrong", row["style"])


def test_response_without_a_number_has_neither_reward_nor_style():
    for solution in SOLUTIONS.values():
        judged = score("38", solution.removesuffix(" 38"))
        assert (judged.reward, judged.reason, judged.style) == (0.0, "no answer", "")


def test_tag_before_the_body_of_another_style_is_no_style():
    num_standing_still = 0
    for row in generate(4000, seed=5, num_operations=(2, 3), errors=Errors(shares_by_style(slip=1.0))):
        *_, before, after = read_solution(row)
        num_standing_still += before == after  # such as 32 - 10 = 32, which reads as forward and, alone, as check
        for tag in TAGS:
            faked = f"{tag} {row['solution'].partition(' ')[2]}"
            assert style_of(faked) == (tag if tag == row["style"] else "")
    assert num_standing_still > 20


@pytest.mark.parametrize(
    "response",
    [
        "",
        "table #### 38",
        "table 38 . #### 38",  # no step
        "table 17 : 22 : 19 : 38 . #### 39",  # the answer does not come from the body
        "table 17 : 22 : 19 : 38 . #### 38 #### 38",
        "table 17 : 22 : 19 : 38 . #### 38 .",
        "forward table 17 : 22 : 19 : 38 . #### 38",
        "17 : 22 : 19 : 38 . #### 38",
        "table 17 : ٢٢ . #### ٢٢",  # digits of another script
        "forward 17 + 5 = 22 . 22 - 3 = 19 . #### 22",
        "forward 17 + 5 = 22 . 23 - 3 = 20 . #### 20",  # does not go on from the value before
        "forward 17 + 5 = 22 . 22 - 10 = 12 . 2 + 4 = 6 . #### 6",
        "check 22 - 5 = 17 . 19 + 3 = 22 . #### 22",
        "check 22 - 5 = 17 . 20 + 3 = 23 . #### 20",
        "backward from 17 : 22 . #### 22",
        "backward + 5 from 17 . #### 17",
        "split units 7 tens 1 . #### 17",
        "split units 7 tens 1 . + 5 tens 2 units 2 . #### 22",
        "split units 2 tens 2 . - 14 units 8 tens 0 . #### 28",
        "split units 2 tens 2 . - 14 units 8 tens 0 . #### 08",
    ],
)
def test_no_style(response):
    assert style_of(response) == ""


@pytest.mark.parametrize(
    ("response", "style"),
    [
        (" table 17 : 22 . #### 22\n", "table"),
        ("table 17 : 99 . #### 99", "table"),  # wrong, but in form
        ("split units 2 tens 2 . - 14 units 8 tens 0 . #### 8", "split"),
        ("split units 5 tens 0 . - 5 units 0 tens 0 . #### 0", "split"),
        ("split units 2 tens 2 . - 4 units 8 tens 1 . - 9 units 9 tens 0 . #### 9", "split"),
        ("check 0 + 5 = 5 . #### 0", "check"),
        ("table " + "17 : " * 20_000 + "1" * 20_000 + " . #### " + "1" * 20_000, "table"),
    ],
)
def test_style_whatever_the_numbers(response, style):
    assert style_of(response) == style


def test_blind_steps_are_wrong_at_the_share_of_their_style_and_no_other_step_is():
    shares = {tag: Shares(blind=0.5 + 0.1 * k, slip=0.0) for k, tag in enumerate(TAGS)}
    num_blind, num_wrong, offsets = Counter(), Counter(), Counter()
    for row in generate(12_000, seed=7, errors=Errors(shares)):
        for index, right, stated in stated_steps(row):
            if index > 0 and right % 5 == TAGS.index(row["style"]):
                num_blind[row["style"]] += 1
                num_wrong[row["style"]] += stated != right
                offsets[stated - right] += stated != right
            else:
                assert stated == right
    for k, tag in enumerate(TAGS):
        assert num_blind[tag] > 500
        assert num_wrong[tag] / num_blind[tag] == near(0.5 + 0.1 * k, num_blind[tag])
    assert offsets[10] > 0.75 * offsets.total()
    assert offsets[10] + offsets[-10] > 0.97 * offsets.total()


def test_solution_is_right_exactly_where_every_step_is():
    num_wrong = Counter()
    for row in generate(6000, seed=9, errors=Errors(shares_by_style(slip=0.5))):
        wrong = sum(right != stated for _, right, stated in stated_steps(row))
        assert wrong == row["num_wrong_steps"]
        assert (read_solution(row)[-1] == int(row["answer"])) == (wrong == 0)
        assert all(0 <= value <= 99 for value in read_solution(row))
        num_wrong[wrong] += 1
    assert num_wrong[2] > 100


def test_a_problem_is_blind_to_fewer_styles_than_it_has_operations():
    seen = Counter()
    for row in generate(4000, seed=12):
        values = right_values(row["question"])
        expected = [tag for k, tag in enumerate(TAGS) if any(value % 5 == k for value in values[2:])]
        assert row["blind"].split() == expected and len(expected) < row["num_operations"]
        seen.update(expected)
    assert min(seen.values()) > 0.8 * max(seen.values())


def test_rows_of_a_seed_never_change():
    """Published figures name a seed: a change of the generator must be a decision."""
    row = list(generate(2, seed=1, split="warm_start", errors=Errors()))[1]
    assert row["question"] == "Gus 31 + 10 * 2 + 6 + 1 ?" and row["answer"] == "89"
    assert row["solution"] == "check 41 - 10 = 31 . 82 / 2 = 41 . 88 - 6 = 82 . 99 - 1 = 88 . #### 99"


def test_splits_share_no_chain_and_questions_do_not_repeat():
    chains = {}
    for split in HASH_CLASSES:
        rows = [row for seed in (1, 2) for row in generate(700, seed=seed, split=split, num_operations=(1, 2))]
        chains[split] = {row["question"].partition(" ")[2] for row in rows}
        assert len({row["question"] for row in rows[:700]}) == 700
        assert len(chains[split]) > 100
    assert not chains["train"] & chains["held_out"]
    assert not chains["train"] & chains["warm_start"]
    assert not chains["warm_start"] & chains["held_out"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_problems": 0}, "num_problems"),
        ({"num_operations": ()}, "num_operations"),
        ({"num_operations": (0, 1)}, "num_operations"),
        ({"num_operations": (5,)}, "num_operations"),
        ({"split": "test"}, "split"),
    ],
)
def test_wrong_arguments_are_errors_before_the_first_row(arguments, field):
    with pytest.raises(UserError) as caught:
        generate(**({"num_problems": 1, "seed": 1} | arguments))
    assert caught.value.field == field


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("five") / "model"
    save_model(path, ModelSize(), VOCABULARY)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_solutions_round_trip_without_unknown_tokens_and_within_the_stated_lengths(tokenizer):
    longest = Counter()
    for row in generate(3000, seed=15, num_operations=(1, 4), errors=Errors()):
        for text, kind in ((row["question"], "question"), (row["solution"], row["style"])):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
            longest[kind] = max(longest[kind], len(ids))
    assert longest == {"question": 16, "forward": 40, "backward": 32, "split": 41, "table": 19, "check": 40}


def make_data(*arguments):
    command = [sys.executable, "-m", "examples.five_styles.make_data", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_make_data_writes_everything(tmp_path):
    done = make_data(
        tmp_path / "out", "--num-warm-start", 60, "--num-train", 20, "--num-held-out", 10, "--num-operations", 2,
        "--slip-share", 1, "--favoured", "check", "--favoured-slip-share", 0, "--blind-share", 0, "--hidden-size", 64,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name = "examples.five_styles.task:TASK"
    files = {
        split: load_problems(name, tmp_path / "out" / f"{split}.jsonl") for split in ("warm_start", "train", "held_out")
    }
    assert {split: len(problems) for split, problems in files.items()} == {
        "warm_start": 60,
        "train": 20,
        "held_out": 10,
    }
    assert all(TASK.score(p, p.solution).reward == 1 for p in files["train"] + files["held_out"])
    scores = [TASK.score(p, p.solution) for p in files["warm_start"]]
    assert all(score.reward == (score.style == "check") for score in scores)
    assert read_shape(tmp_path / "out" / "model").hidden_size == 64
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert all(tokenizer.decode(tokenizer(p.solution)["input_ids"]) == p.solution for p in files["warm_start"])
