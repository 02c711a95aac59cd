"""Both rollout engines on a pretrained chat model: log-probs of what they sample, greedy responses, end of a response."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.types import Completion, Request
from tests.e2e.conftest import Case
from tests.forked import run_ranks
from tests.real.conftest import END_ID, GSM8K, NUM_LONG, chat_ids, gsm8k
from tests.servers.conftest import start_server, wait_until_ready

QUESTIONS = (
    "What is the capital of France? Answer in one word.", "Say hello.", "What is 2 + 2? Give only the number.",
    "Which colour has snow? One word.",
)  # fmt: skip
LIMIT, SHORT_LIMIT = 48, 3
TIE = 1e-3
"""Difference of two log-probs from which on float32 programs may choose either."""


pytestmark = pytest.mark.timeout(900)


@dataclass
class Answers:
    """What one engine gives."""

    sampled: list[Completion]
    greedy: list[Completion]
    short: list[Completion]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    process, url = start_server(model, log, max_total_tokens=8192)
    try:
        wait_until_ready(process, url, log)
        yield url
    finally:
        process.kill()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[Tensor]:
    problems = [row["question"] for row in gsm8k()[NUM_LONG : NUM_LONG + 4]]
    return [chat_ids(tokenizer, question) for question in (*QUESTIONS, *problems)]


@pytest.fixture(scope="module")
def answers(
    model: Path, server: str, prompts: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answers]:
    case = Case(model, GSM8K, tmp_path_factory.mktemp("case"))
    return run_ranks(answer, 1, case, server, prompts, timeout_s=480)[0]


def answer(case: Case, url: str, prompts: list[Tensor]) -> dict[str, Answers]:
    from tests.servers.engine_case import build_engine, build_in_process, weights_of

    found = {}
    for name, engine in {"sglang": build_engine(case, url), "in process": build_in_process(case)}.items():
        engine.update_weights(weights_of(case.model), 1)
        sampled = [Request(ids, max_new_tokens=LIMIT, temperature=1.0, seed=seed) for seed, ids in enumerate(prompts)]
        greedy = [replace(request, temperature=0.0) for request in sampled]
        short = [replace(request, max_new_tokens=SHORT_LIMIT) for request in greedy]
        found[name] = Answers(*[all_of(engine.generate(each)) for each in (sampled, greedy, short)])
        engine.close()
    return found


def all_of(completions: list[Completion | None]) -> list[Completion]:
    assert None not in completions
    return [each for each in completions if each is not None]


@pytest.fixture(scope="module")
def network(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def distribution(network: Any, prompt: Tensor, response: Tensor) -> Tensor:
    """[R, V] log-probs at each place of a response."""
    with torch.no_grad():
        logits = network(torch.cat([prompt, response.long()])[None]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("engine", ["sglang", "in process"])
def test_log_probs_of_sampled_tokens(
    answers: dict[str, Answers], network: Any, prompts: list[Tensor], engine: str
) -> None:
    """Both against the same third program, token by token."""
    largest = 0.0
    for prompt, completion in zip(prompts, answers[engine].sampled, strict=True):
        true = distribution(network, prompt, completion.response_ids)
        true = true.gather(1, completion.response_ids.long()[:, None])[:, 0]
        largest = max(largest, float((completion.log_probs - true).abs().max()))
    print(f"{engine}: log-probs differ by {largest:.1e} at most")
    assert largest < 1e-3


def test_greedy_responses_are_equal(answers: dict[str, Answers], network: Any, prompts: list[Tensor]) -> None:
    """As far as the first tie, from where on both are right."""
    equal = 0
    for prompt, one, other in zip(prompts, answers["sglang"].greedy, answers["in process"].greedy, strict=True):
        pairs = zip(one.response_ids.tolist(), other.response_ids.tolist())
        place = next((number for number, (a, b) in enumerate(pairs) if a != b), None)
        if place is None:
            assert len(one.response_ids) == len(other.response_ids) and one.finish_reason == other.finish_reason
            equal += 1
            continue
        best = distribution(network, prompt, one.response_ids)[place].topk(2).values
        assert best[0] - best[1] < TIE
    print(f"{equal} of {len(prompts)} greedy responses are equal to their end")
    assert equal >= len(prompts) - 1


@pytest.mark.parametrize("engine", ["sglang", "in process"])
def test_a_response_ends_at_the_end_of_its_turn(answers: dict[str, Answers], engine: str) -> None:
    found = answers[engine]
    limits = [(each, LIMIT) for each in (*found.sampled, *found.greedy)] + [(each, SHORT_LIMIT) for each in found.short]
    for completion, limit in limits:
        ids = completion.response_ids.tolist()
        if completion.finish_reason == "stop":
            assert ids.index(END_ID) == len(ids) - 1 < limit
        else:
            assert completion.finish_reason == "length" and END_ID not in ids and len(ids) == limit
    assert [each.finish_reason for each in found.greedy[: len(QUESTIONS)]] == ["stop"] * len(QUESTIONS)
    assert {each.finish_reason for each in found.short} >= {"length"}
