import threading
import time

import pytest

from megatron_rl.rewards.math import find_marked_answer, score_math


@pytest.mark.parametrize(
    ("answer", "marked"),
    [
        ("72", "72"), ("72", "072"), ("72", "72."), ("72", "72.0"), ("72", " 72 "), ("72", "**72**"), ("72", "$72$"),
        ("72", r"\$72"), ("72", "$72"), ("72", "€72"), ("72", "72 clips"), ("72", r"72\text{ clips}"),
        ("72", r"72\ \text{clips}"), ("72", r"\text{72 clips}"), ("72", "72 km/h"), ("72", "72cm^2"), ("72", "72 m"),
        ("72", "$72.00 per month"), ("72", "+72"), ("72", r"72^{\circ}"), ("72", "x = 72"), ("72", "70+2"),
        ("1234", "1,234"), ("1234", "1{,}234"), ("1234", r"1\,234"), ("1234", "1 234"), ("1234", "$1,234.00"),
        ("1234567.5", "1,234,567.50"), ("-3", "-3"), ("-3", "\N{MINUS SIGN}3 m"), ("-3", "-$3"),
        ("-3", "$-3"), ("-3", "\N{MINUS SIGN}3 clips"), ("0.75", r"\frac{3}{4}."),
        ("0.75", "3/4"), ("0.75", r"\frac{3}{4}"), ("0.75", r"\dfrac34"), ("0.75", ".75"), ("0.75", r"75\%"),
        ("0.5", "0.5000000001"), ("2.5", r"2\frac{1}{2}"), (r"\frac{1}{3}", "1/3"), (r"\frac{1}{2}", "0.5"),
        ("50", "50%"), ("x+1", "1+x"),
        ("x+1", "1+x."), (r"\text{east}", r"\text{east}"), (r"(1,2)", r"(1, 2)"),
        ("100000", "10^5"),
    ],
)  # fmt: skip
def test_equal_answers(answer, marked):
    score = score_math(answer, f"Some steps.\nThe answer is \\boxed{{{marked}}}.")
    assert (score.reward, score.parts, score.reason) == (1.0, {"correct": 1.0, "format": 1.0}, "correct")
    assert not score.is_failure


@pytest.mark.parametrize(
    ("answer", "marked"),
    [
        ("72", "71"), ("72", "-72"), ("72", "720"), ("72", "7.2"), ("72", "72.01"), ("72", "72 or 71"),
        ("72", "71, 72"), ("72", "72 thousand"), ("72", "72 dozen"), ("72", "seventy-two"), ("72", "x"),
        ("72", "72x"), ("72", "7 2"), ("72", "72^2"), ("72", "72^{3}"), ("72", "72²"),
        ("72", "9" * 100_000), ("72", "(" * 50), ("72", "7" * 900), ("72", "NaN"),
        ("72", r"\infty"), ("72", r"\frac{1}{0}"), ("1234", "1,23,4"), ("1234", "1.234"), ("10", "10:30"),
        ("3", "-3"), ("-3", "3"), ("0.75", "4/3"), ("2", "2 pi"), ("0", ""), ("72", "72" + "0" * 1000),
        ("72", "\N{SUPERSCRIPT TWO}"), ("72", "\N{ARABIC-INDIC DIGIT SEVEN}"),
    ],
)  # fmt: skip
def test_unequal_answers(answer, marked):
    score = score_math(answer, f"\\boxed{{{marked}}}")
    assert score.reward == score.parts["correct"] == 0.0
    assert score.reason in ("wrong", "no answer")
    assert not score.is_failure


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{2} then \boxed{}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{2}}", "2"),
        (r"\fbox{2}", "2"),
        (r"\boxed {2}", "2"),
        (r"{{{ \boxed{2} }}}}}} }", "2"),
        (r"\boxed{\{2\}}", r"\{2\}"),
        (r"\boxed{1} and cut \boxed{2", "1"),
        (r"\boxed{1} #### 2", "1"),
        ("#### 1\n#### 2\nmore", "2"),
        ("####\n2", "2"),
        (r"\boxed{", None),
        ("####", None),
        ("", None),
        ("72", None),
    ],
)
def test_marked_answer(response, found):
    assert find_marked_answer(response) == found


@pytest.mark.parametrize("response", ["", " ", "no number", "\\boxed{}", "####", "\x00", "\N{PILE OF POO}" * 10_000])
def test_no_answer(response):
    score = score_math("72", response)
    assert (score.reward, score.parts, score.reason) == (0.0, {"correct": 0.0, "format": 0.0}, "no answer")


@pytest.mark.parametrize("response", ["The answer is 72.", "so 70 + 2 = 72", "= $72", "clips: 1,000 - 928 = 72 clips"])
def test_unmarked_answer_is_correct_without_form(response):
    assert score_math("72", response).parts == {"correct": 1.0, "format": 0.0}


def test_unmarked_answer_is_the_last_number():
    assert score_math("72", "It is 72. No, it is 71.").reward == 0
    assert score_math("72", "It is 72. " + "Let me think. " * 1000).reason == "no answer"


def test_answer_after_marks_counts_as_form():
    assert score_math("1234", "steps\n#### 1,234").parts == {"correct": 1.0, "format": 1.0}


@pytest.mark.parametrize("text", [r"\boxed{" * 20_000, "{" * 100_000, "}" * 100_000, "####" * 50_000, "$" * 100_000])
def test_long_broken_text_is_read_in_linear_time(text):
    start = time.monotonic()
    score_math("72", text)
    assert time.monotonic() - start < 2


def test_works_outside_the_main_thread():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(score_math("0.75", r"\boxed{\frac{3}{4}}").reward))
    thread.start()
    thread.join()
    assert rewards == [1.0]
