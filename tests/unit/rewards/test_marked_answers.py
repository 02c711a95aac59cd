"""Where a response states its final answer."""

from __future__ import annotations

import time

import pytest

from megatron_rl.rewards.answers import find_marked_answer
from megatron_rl.rewards.math import score_math


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{2} then \boxed{}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{2}", "2"),
        (r"\boxed {2}", "2"),
        (r"{{{ \boxed{2} }}}}}} }", "2"),
        (r"\boxed{\{2\}}", r"\{2\}"),
        (r"\boxed{\geq \boxed{2}}", r"\geq \boxed{2}"),
        (r"\boxed{x = \boxed{2}", "2"),  # the outer box was not opened after the inner one
        (r"\boxed{1} #### 2", "1"),
        (r"\boxed{1} and cut \boxed{2", ""),
        (r"\boxed{1} and cut \boxed{\frac{2}{3}", ""),
        (r"\boxed{", ""),
        (r"#### 1 \boxed{", ""),
        ("\\boxed{}", None),
    ],
)
def test_last_box(response: str, found: str | None) -> None:
    assert find_marked_answer(response) == found


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("<answer> 1 </answer> no, <answer>2</answer>", "2"),
        ("put it in <answer> tags: <answer>2</answer>", "2"),
        ("<answer>2</answer> <answer> </answer>", "2"),
        ("<answer>2</answer> no, <answer>3", ""),
        ("</answer>", None),
        ("<think>2</think>", None),
    ],
)
def test_last_tag(response: str, found: str | None) -> None:
    assert find_marked_answer(response) == found


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("#### 1\n#### 2\nmore", "2"),
        ("####2", "2"),
        ("so 1 + 1 = 2 #### 2", "2"),
        ("#### 1 #### 2", "2"),
        ("#### $2$", "$2$"),
        ("#### **2**", "**2**"),
        ("#### -2.50 dollars per day", "-2.50 dollars per day"),
        ("#### 1,000", "1,000"),
        ("#### 1/2", "1/2"),
        ("#### 2 Apples", "2 Apples"),
        ("#### Step 1\nThus 2\n#### 2\n\n#### Check\nIt is.", "2"),
        ("#### Step 1", None),
        ("#### 1. Compute", None),
        ("#### 1) Compute", None),
        ("#### 2 Methods\nFirst ...", None),
        ("#### 2 or 3", None),
        ("#### 2 apples and 3 pears", None),
        ("#### x = 2", None),
        ("### 2", None),
        ("##### 2", None),
        ("####\n2", None),
        ("####", None),
    ],
)
def test_last_hashes_before_a_number_alone(response: str, found: str | None) -> None:
    assert find_marked_answer(response) == found


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("The answer is 72", "72"),
        ("The answer is 72.", "72"),
        ("the final answer is: 72 clips. I hope it is correct.", "72 clips"),
        ("So the correct answer is $72.", "$72"),
        ("The answer to the question is **72**.", "72"),
        ("The answer is 3.5. So it is.", "3.5"),
        ("Answer: 72", "72"),
        ("**Answer:** 72", "72"),
        ("**Final Answer**: 72", "72"),
        ("Answer:\n\n72", "72"),
        ("ANSWER: C", "C"),
        ("The answer is (C).", "(C)"),
        ("The final answer is $x + 1$. I hope it is correct.", "$x + 1$"),
        ("The answer is:\n$$\nx + 1\n$$", "$$\nx + 1\n$$"),
        (r"The answer is \[x + 1\]", r"\[x + 1\]"),
        (r"The answer is \frac{1}{2}.", r"\frac{1}{2}"),
        ("The answer is 5 + 6 = 11.", "5 + 6 = 11"),
        ("The answer is (1, 2).", "(1, 2)"),
        ("答案是72。", "72"),
        ("最终答案\N{FULLWIDTH COLON}72元", "72元"),
        ("The answer is 5. No, the answer is 6.", "6"),
        ("The answer is 5. I am sure that the answer is right.", "5"),
    ],
)
def test_sentence_that_states_the_answer(response: str, found: str) -> None:
    assert find_marked_answer(response) == found


@pytest.mark.parametrize(
    "response",
    [
        "72",
        "so x = 72",
        "The answer is not 72.",
        "The answer is at least 72.",
        "The answer is 72 or 73.",
        "The answer is $72$ or $73$.",
        "The answer is $$72$$ or $$73$$",
        "The answer is 72, unless it is 73.",
        "The answer is 72 if x = 73.",
        "The answer is 72 ft. 6 in.",
        "Is the answer 72?",
        "If the answer is 72",
        "The answer is 72. Or the answer is 72 or 73.",
        "The answers are 72 and 73.",
        "The answer is " + "7" * 300,
    ],
)
def test_sentence_with_more_than_an_answer_states_none(response: str) -> None:
    assert find_marked_answer(response) is None


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 20_000, "{" * 100_000, "}" * 100_000, "\\" * 100_000, "9" * 100_000, "####" * 50_000, "$" * 100_000,
        "#### 1 a b\n" * 20_000, "#### " * 30_000, "The answer is 5 x " * 10_000, "Answer:\n" * 20_000, "答案是" * 30_000,
        "<answer>" * 20_000, "</answer>" * 20_000, "Answer:" + " " * 100_000, r"The answer is \[ x " * 10_000,
        r"\boxed" + " " * 100_000 + "{5}", r"\boxed{" + " " * 100_000 + "5}", "Answer: " + "1," * 50_000,
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
@pytest.mark.parametrize("lenient", [False, True])
def test_long_text_is_read_in_linear_time(text: str, lenient: bool) -> None:
    start = time.monotonic()
    score_math("72", text, lenient=lenient)
    assert time.monotonic() - start < 2
