import gzip
import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from megatron_rl.errors import UserError
from megatron_rl.tasks import get_task
from megatron_rl.tasks.problems import load_problems
from megatron_rl.tasks.word_problems import HASH_CLASSES, Chain, Step, generate, write_rows
from megatron_rl.types import Problem

STATEMENT = re.compile(r"(\w+) has (\d+) (?:(more|fewer|times as many) (?:than|as) (\w+) )?\.")
STEP = re.compile(r"(\w+) (\d+) ([-+*]) (\d+) = (\d+) \.")
APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
SIGN = {"more": "+", "fewer": "-", "times as many": "*"}


def solve(question):
    """(answer, chain in text form, values): an independent reading of the question, in any order of statements."""
    facts = {name: (int(number), phrase, other) for name, number, phrase, other in STATEMENT.findall(question)}
    name = re.search(r"How many has (\w+) \?$", question)[1]
    operations = []
    while facts[name][1]:
        number, phrase, name = facts[name]
        operations.append((SIGN[phrase], number))
    values = [facts[name][0]]
    for sign, number in reversed(operations):
        values.append(APPLY[sign](values[-1], number))
    return values[-1], (values[0], *reversed(operations)), values


def test_example_of_the_module_docstring_scores():
    chain = Chain(7, (Step("+", 5), Step("*", 3)))
    assert chain.canonical == "7 +5 *3"
    assert solve("Ana has 7 . Ben has 5 more than Ana . Cal has 3 times as many as Ben . How many has Cal ?")[0] == 36


@pytest.mark.parametrize("shuffle", [False, True])
def test_answers_are_right_and_values_in_range(shuffle):
    for row in generate(2000, seed=3, slip_share=0.5, shuffle_statements=shuffle):
        answer, chain, values = solve(row["question"])
        assert row["answer"] == str(answer)
        assert all(0 <= value <= 99 for value in values)
        assert row["num_operations"] == len(chain) - 1


def test_clean_solution_states_every_step_and_ends_in_the_answer():
    for row in generate(500, seed=4):
        steps = STEP.findall(row["solution"])
        assert len(steps) == row["num_operations"]
        assert all(APPLY[sign](int(a), int(b)) == int(c) for _, a, sign, b, c in steps)
        assert row["solution"].endswith(f"#### {row['answer']}") and row["num_slips"] == 0


def test_slips_have_the_stated_share_and_are_carried_on():
    rows = list(generate(6000, seed=5, slip_share=0.2))
    num_slips = 0
    for row in rows:
        steps = STEP.findall(row["solution"])
        wrong = sum(APPLY[sign](int(a), int(b)) != int(c) for _, a, sign, b, c in steps)
        assert wrong == row["num_slips"]
        assert all(before[4] == after[1] for before, after in pairwise(steps))
        assert row["solution"].endswith(f"#### {steps[-1][4]}") and 0 <= int(steps[-1][4]) <= 99
        assert row["answer"] == str(solve(row["question"])[0])
        num_slips += wrong
    num_steps = sum(row["num_operations"] for row in rows)
    assert num_slips / num_steps == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / num_steps) ** 0.5)  # 4 standard errors


def test_forgotten_carries_have_the_stated_share_and_touch_nothing_else():
    rows = list(generate(6000, seed=5, forgotten_carry_share=0.6))
    num_carries = num_forgotten = 0
    for row in rows:
        for _, a, sign, b, c in STEP.findall(row["solution"]):
            right, stated = APPLY[sign](int(a), int(b)), int(c)
            units = APPLY[sign](int(a) % 10, int(b) % 10)
            carries = sign != "*" and not 0 <= units <= 9
            assert stated == right or (carries and stated == right - 10 * (1 if sign == "+" else -1))
            num_carries += carries
            num_forgotten += stated != right
        assert row["answer"] == str(solve(row["question"])[0])
    # A little below 0.6: where the forgotten ten would take a later step out of range, it is remembered.
    assert 0.55 < num_forgotten / num_carries < 0.62


def test_operations_are_drawn_from_the_given_numbers():
    assert Counter(row["num_operations"] for row in generate(300, seed=6, num_operations=(2, 5))).keys() == {2, 5}


def test_same_seed_same_rows_other_seed_other_rows():
    first, again, other = (list(generate(50, seed=seed, slip_share=0.3)) for seed in (1, 1, 2))
    assert first == again
    assert not {row["question"] for row in first} & {row["question"] for row in other}


def test_rows_of_a_seed_never_change():
    """Published figures name a seed: a change of the generator must be a decision."""
    assert next(generate(1, seed=1))["question"] == "Dan has 19 . Pam has 9 more than Dan . How many has Pam ?"


def test_splits_share_no_chain_under_any_seed_or_setting():
    chains = {}
    for split in HASH_CLASSES:
        settings = ((1, (1,), False), (2, (1, 2), True), (3, (1, 2, 3), False))
        chains[split] = {
            solve(row["question"])[1]
            for seed, operations, shuffle in settings
            for row in generate(700, seed=seed, num_operations=operations, split=split, shuffle_statements=shuffle)
        }
        assert len(chains[split]) > 40
    assert not chains["train"] & chains["held_out"]
    assert not chains["train"] & chains["warm_start"]
    assert not chains["warm_start"] & chains["held_out"]


def test_hash_classes_cover_sixteen_once():
    assert sorted(c for classes in HASH_CLASSES.values() for c in classes) == list(range(16))


def test_no_duplicates_in_one_call_even_in_another_order():
    questions = [row["question"] for row in generate(5000, seed=7, num_operations=(1,), shuffle_statements=True)]
    assert len({tuple(sorted(STATEMENT.findall(question))) for question in questions}) == 5000


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_problems": 0}, "num_problems"),
        ({"num_operations": ()}, "num_operations"),
        ({"num_operations": (0, 1)}, "num_operations"),
        ({"num_operations": (20,)}, "num_operations"),
        ({"slip_share": 1.0}, "slip_share"),
        ({"slip_share": -0.1}, "slip_share"),
        ({"forgotten_carry_share": 1.0}, "forgotten_carry_share"),
        ({"split": "test"}, "split"),
    ],
)
def test_wrong_arguments_are_errors_before_the_first_row(arguments, field):
    with pytest.raises(UserError) as caught:
        generate(**({"num_problems": 1, "seed": 1} | arguments))
    assert caught.value.field == field


def test_more_problems_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr("megatron_rl.tasks.word_problems.NAMES", ("Ana", "Ben"))
    monkeypatch.setattr("megatron_rl.tasks.word_problems.MAX_FRUITLESS_TRIES", 2000)
    with pytest.raises(UserError, match="no further held_out problem"):
        list(generate(10_000, seed=1, num_operations=(1,), split="held_out"))


@pytest.mark.parametrize("name", ["deep/train.jsonl", "train.jsonl.gz"])
def test_written_rows_load_as_problems(tmp_path, name):
    rows = list(generate(20, seed=1))
    assert write_rows(tmp_path / name, iter(rows)) == 20
    problems = load_problems("word_problems", tmp_path / name)
    assert [(p.prompt, p.answer, p.solution) for p in problems] == [
        (row["question"], row["answer"], row["solution"]) for row in rows
    ]


def test_interrupted_writing_leaves_no_file(tmp_path):
    def rows():
        yield {"question": "q"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "a.jsonl", rows())
    assert not (tmp_path / "a.jsonl").exists()


def test_problem_without_solution_loads_and_bad_answer_does_not(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"question": "q", "answer": "36"}).encode()))
    assert load_problems("word_problems", path)[0].solution is None
    path.write_bytes(gzip.compress(json.dumps({"question": "q", "answer": "thirty"}).encode()))
    with pytest.raises(UserError, match="must be an integer"):
        load_problems("word_problems", path)


def score_of(answer, response):
    return get_task("word_problems").score(Problem("id", "text", answer), response)


@pytest.mark.parametrize(
    ("response", "reward", "form", "reason"),
    [
        ("Ana 7 . Ben 7 + 5 = 12 . #### 12", 1, 1, "correct"),
        ("#### 1 2", 1, 1, "correct"),  # a token a digit
        ("####12\n", 1, 1, "correct"),
        ("#### 012", 1, 1, "correct"),
        ("#### 11", 0, 1, "wrong"),
        ("#### -12", 0, 1, "wrong"),
        ("#### 12 #### 13", 0, 1, "wrong"),  # the last one counts
        ("#### 13 #### 12", 1, 1, "correct"),
        ("#### " + "1" * 100_000, 0, 1, "wrong"),
        ("", 0, 0, "no answer"),
        ("12", 0, 0, "no answer"),
        ("####", 0, 0, "no answer"),
        ("#### 12 #### ", 0, 0, "no answer"),
        ("#### twelve", 0, 0, "no answer"),
        ("#### 12 .", 0, 0, "no answer"),
        ("#### 12 Ana 7", 0, 0, "no answer"),
        ("#### 1  2", 0, 0, "no answer"),
        ("#### 12.0", 0, 0, "no answer"),
    ],
)
def test_score(response, reward, form, reason):
    score = score_of("12", response)
    assert (score.reward, score.parts, score.reason) == (reward, {"correct": reward, "format": form}, reason)
    assert not score.is_failure


def test_zero_and_negative_answers_compare():
    assert score_of("0", "#### 00").reward == 1
    assert score_of("0", "#### -0").reward == 1
    assert score_of("-5", "#### -05").reward == 1
    assert score_of("5", "#### -5").reward == 0


def test_a_number_at_the_limit_may_lack_its_end():
    problem = Problem("id", "text", "3")
    score = get_task("word_problems").score(problem, "1 + 2 = 3 #### 3", finish_reason="length")
    assert (score.reward, score.reason) == (0.0, "cut")
