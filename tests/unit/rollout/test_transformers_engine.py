"""The in-process engine: what it samples, what it says of it, and that a completion belongs to its request alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.recorded import RecordedEngine, RecordingEngine
from megatron_rl.rollout.share import flatten, unflatten
from megatron_rl.rollout.transformers_engine import TransformersEngine
from megatron_rl.types import Completion, Request
from megatron_rl.weight_sync.delivery import WeightDelivery
from tests.forked import run_ranks
from tests.tiny_models import EOS_ID, make_tiny_model

VOCAB = 131


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tied=False, seed=2)


def engine(model: Path, max_batch_size: int = 8, pad_id: int = 0) -> TransformersEngine:
    built = TransformersEngine(
        model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        stop_ids=[EOS_ID, 5],
        pad_id=pad_id,
        max_batch_size=max_batch_size,
        cpu_group=dist.group.WORLD,
    )
    source = AutoModelForCausalLM.from_pretrained(model)
    built.update_weights(WeightDelivery(source.named_parameters), version=3)
    return built


def requests(count: int = 10, **settings: float) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    return [
        Request(
            torch.randint(6, VOCAB, (int(torch.randint(1, 20, (1,), generator=generator)),), generator=generator),
            **({"max_new_tokens": 15, "temperature": 0.8, "seed": i} | settings),
        )
        for i in range(count)
    ]


def generate(model: Path, asked: list[Request], max_batch_size: int = 8, pad_id: int = 0) -> list[Completion]:
    return engine(model, max_batch_size, pad_id).generate(asked)


@pytest.mark.parametrize("temperature", [0.8, 1.0])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.7}, {"top_k": 3}])
def test_log_probs_are_those_of_the_full_softmax_at_the_temperature(model: Path, temperature: float, cut: dict) -> None:
    asked = requests(temperature=temperature, **cut)
    found = run_ranks(generate, 1, model, asked)[0]
    source = AutoModelForCausalLM.from_pretrained(model)
    for request, completion in zip(asked, found):
        ids = torch.cat([request.prompt_ids, completion.response_ids])
        with torch.no_grad():
            log_p = (source(ids[None]).logits[0].double() / temperature).log_softmax(-1)
        start = len(request.prompt_ids) - 1
        expected = log_p[start:-1].gather(1, completion.response_ids.long()[:, None])[:, 0]
        torch.testing.assert_close(completion.log_probs.double(), expected, atol=1e-4, rtol=0)
        if cut.get("top_k"):
            ranks = (log_p[start:-1] > expected[:, None]).sum(-1)
            assert ranks.max() < 3


def test_greedy_is_transformers_own_greedy(model: Path) -> None:
    asked = requests(temperature=0.0)
    source = AutoModelForCausalLM.from_pretrained(model)
    for request, completion in zip(asked, run_ranks(generate, 1, model, asked)[0]):
        out = source.generate(
            request.prompt_ids[None], max_new_tokens=15, do_sample=False, eos_token_id=[EOS_ID, 5], pad_token_id=0
        )
        assert out[0, len(request.prompt_ids) :].tolist() == completion.response_ids.tolist()


@pytest.mark.parametrize(("world_size", "max_batch_size"), [(1, 3), (2, 8), (3, 1)])
def test_a_completion_does_not_depend_on_its_neighbours(model: Path, world_size: int, max_batch_size: int) -> None:
    asked = requests()
    alone = run_ranks(generate, 1, model, asked)[0]
    for others in run_ranks(generate, world_size, model, asked, max_batch_size):
        assert [c.response_ids.tolist() for c in others] == [c.response_ids.tolist() for c in alone]


def test_without_a_pad_token_an_end_token_fills_batches_and_changes_nothing(model: Path) -> None:
    asked = requests()
    true, found = (run_ranks(generate, 1, model, asked, 8, pad_id)[0] for pad_id in (0, EOS_ID))
    assert {completion.finish_reason for completion in true} == {"stop", "length"}
    for one, other in zip(true, found, strict=True):
        assert torch.equal(one.response_ids, other.response_ids) and one.finish_reason == other.finish_reason
        torch.testing.assert_close(one.log_probs, other.log_probs)


def test_stop_and_length(model: Path) -> None:
    found = run_ranks(generate, 1, model, requests(60, max_new_tokens=40))[0]
    stopped = [c for c in found if c.finish_reason == "stop"]
    assert stopped and len(stopped) < len(found)
    for completion in found:
        ids = completion.response_ids.tolist()
        assert completion.weight_version == 3 and len(completion.log_probs) == len(ids)
        if completion.finish_reason == "stop":
            assert ids[-1] in (EOS_ID, 5) and not {EOS_ID, 5} & set(ids[:-1])
        else:
            assert len(ids) == 40 and not {EOS_ID, 5} & set(ids)


@pytest.mark.slow
def test_samples_follow_the_distribution(model: Path) -> None:
    prompt = requests(1)[0].prompt_ids
    asked = [Request(prompt, max_new_tokens=1, temperature=1.0, seed=seed) for seed in range(4000)]
    found = run_ranks(generate, 1, model, asked, 1000)[0]
    counts = torch.bincount(torch.tensor([int(c.response_ids[0]) for c in found]), minlength=VOCAB) / len(found)
    with torch.no_grad():
        true = AutoModelForCausalLM.from_pretrained(model)(prompt[None]).logits[0, -1].softmax(-1)
    assert (counts - true).abs().max() < 4 * (true.max() * (1 - true.max()) / len(found)) ** 0.5


def refuse(model: Path, drop: bool) -> str:
    built = engine(model)
    tensors = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    name = "model.norm.weight"
    if drop:
        del tensors[name]
    else:
        tensors[name] = torch.ones(3)
    try:
        built.update_weights(WeightDelivery(tensors.items), version=4)
    except RuntimeError as error:
        return f"{error} version {built.weight_version}"
    return "accepted"


@pytest.mark.parametrize("drop", [True, False])
def test_an_incomplete_update_is_refused(model: Path, drop: bool) -> None:
    message = run_ranks(refuse, 1, model, drop)[0]
    assert "model.norm.weight" in message and message.endswith("version 3")


def record_and_replay(model: Path, directory: Path) -> bool:
    asked = requests()
    first = RecordingEngine(engine(model), directory, is_writer=True).generate(asked)
    again = RecordedEngine(directory).generate(asked)
    return all(
        torch.equal(a.response_ids, b.response_ids) and torch.equal(a.log_probs, b.log_probs)
        for a, b in zip(first, again)
    )


def test_recorded_rollouts_come_back(model: Path, tmp_path: Path) -> None:
    from megatron_rl.errors import UserError

    assert run_ranks(record_and_replay, 1, model, tmp_path) == [True]
    with pytest.raises(UserError, match="no record of these requests"):
        RecordedEngine(tmp_path).generate(requests(seed=99))


def test_flat_tensors_keep_everything() -> None:
    made = [Completion(torch.tensor([1, 2]), torch.tensor([-0.5, -1.0]), "length", 7),
            Completion(torch.tensor([], dtype=torch.int64), torch.tensor([]), "abort", 0),
            Completion(torch.tensor([3]), torch.tensor([-1.0]), "stop", 7, torch.arange(12).short().view(2, 3, 2))]  # fmt: skip
    for a, b in zip(made, unflatten(flatten(made))):
        assert torch.equal(a.response_ids, b.response_ids) and torch.equal(a.log_probs, b.log_probs)
        assert (a.finish_reason, a.weight_version) == (b.finish_reason, b.weight_version)
        assert (b.experts is None) if a.experts is None else torch.equal(a.experts, b.experts)
    assert unflatten(flatten([])) == []


def test_a_completion_that_is_kept_keeps_no_other_in_memory() -> None:
    flat = flatten([Completion(torch.arange(size), torch.zeros(size), "stop", 0) for size in (3, 1000)])
    for ids in (flat["ids"], flat["ids"].long()):  # int64 is what older records hold
        kept = unflatten(flat | {"ids": ids})[0]
        assert kept.response_ids.dtype == torch.int32
        assert kept.response_ids.untyped_storage().nbytes() == kept.log_probs.untyped_storage().nbytes() == 3 * 4
