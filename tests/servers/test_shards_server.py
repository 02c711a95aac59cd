"""Shards from Megatron's ranks (TP2 x PP2) to the ranks of a real SGLang server (TP2), with proof after every update."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.errors import UserError
from megatron_rl.types import Request, RowKind, TrainingSample
from tests.e2e.conftest import Case
from tests.forked import run_ranks
from tests.servers.conftest import start_server, wait_until_ready
from tests.tiny_models import make_tiny_model

NUM_UPDATES = int(os.environ.get("NUM_WEIGHT_UPDATES", 6))
"""The figure in docs/results is of 20."""
SMALL_MESSAGES = [
    "weight_sync.transport=shards", "weight_sync.bucket_bytes=50000", "rollout.servers.start_timeout_s=30",
]  # fmt: skip
LAYOUT = ["policy.megatron_cfg.tensor_model_parallel_size=2", "policy.megatron_cfg.pipeline_model_parallel_size=2"]


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # SGLang on a CPU pads an MLP whose width per rank is not a multiple of 32; such a model gets whole tensors.
    folder = tmp_path_factory.mktemp("model")
    sizes = {"max_position_embeddings": 2048, "intermediate_size": 128}
    return make_tiny_model(folder, "qwen3", tied=False, seed=3, tokenizer=True, **sizes)


@pytest.fixture(scope="module")
def server_of_two(untied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    process, url = start_server(untied_model, log, max_total_tokens=8192, tp_size=2)
    try:
        wait_until_ready(process, url, log)
        yield url
    finally:
        process.kill()


def test_every_update_is_proven_and_sampled_from(case: Case, untied_model: Path, server_of_two: str) -> None:
    here = Case(untied_model, case.train, case.root)
    for rank, result in enumerate(run_ranks(update_and_sample, 4, here, server_of_two, NUM_UPDATES, timeout_s=280)):
        assert result["proven"] == [1.0] * NUM_UPDATES
        assert max(result["log_prob_errors"]) < 1e-4, result["log_prob_errors"]
        assert min(result["moved"]) > 1e-3, "updates that change nothing would prove nothing"
        if rank == 0:
            spans = result["spans"]
            assert [version for version, _, _ in spans] == [str(1 + n) for n in range(len(spans))] and len(spans) > 1, (
                spans
            )
            assert max(error for _, _, error in spans) < 1e-4, spans
            assert min(count for _, count, _ in spans) > 2, spans
            print("in flight (version, tokens, error):", spans)
            print("largest error of a log-prob after each update:", result["log_prob_errors"])
        assert result["mended"] == 1.0, "one update arrived with a flipped bit and was sent again"
        assert "weight_sync.transport" in result["error"] and "has digest" in result["error"], result["error"]
    assert get(server_of_two, "model_info")["weight_version"] == f"updating:{NUM_UPDATES + 1}"


def test_a_trainer_rank_that_dies_in_mid_update_leaves_a_server_that_the_next_run_can_use(
    case: Case, untied_model: Path, server_of_two: str
) -> None:
    here, started = Case(untied_model, case.train, case.root), time.monotonic()
    with pytest.raises(AssertionError, match=r"rank [01] of 2 failed"):
        run_ranks(publish_once, 2, here, server_of_two, True, timeout_s=100)
    assert get(server_of_two, "model_info")["weight_version"] == "updating:1"
    assert run_ranks(publish_once, 2, here, server_of_two, False, timeout_s=100) == [1.0, 1.0]
    assert time.monotonic() - started < 120
    assert get(server_of_two, "model_info")["weight_version"] == "1"


def publish_once(case: Case, url: str, is_fatal: bool) -> float:
    """One update by two ranks; rank 1 may die with its second bucket."""
    from megatron_rl.weight_sync import shards
    from megatron_rl.weight_sync.publish import WeightSync
    from tests.policy_case import build_policy
    from tests.servers.engine_case import build_engine

    overrides = ["policy.megatron_cfg.tensor_model_parallel_size=2", "trainer.devices=2", *SMALL_MESSAGES]
    engine = build_engine(case, url, overrides=overrides)
    policy = build_policy(engine._config)
    sync = WeightSync(engine._config, policy.trainable)
    honest, count = shards.gather, [0]

    def die(*arguments: Any) -> None:
        count[0] += 1
        if is_fatal and count[0] == 2 and policy.groups.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        honest(*arguments)

    shards.gather = die  # type: ignore[assignment]
    sync.publish(engine, version=1)
    proven = sync.metrics["weight_sync/servers_proven"]
    engine.close()
    return proven


def get(url: str, path: str) -> Any:
    with urllib.request.urlopen(f"{url}/{path}", timeout=10) as response:
        return json.loads(response.read())


def update_and_sample(case: Case, url: str, num_updates: int) -> dict[str, Any]:
    """Change the weights, send them, sample, and score what was sampled with the trainer; over and over."""
    import torch.distributed as dist

    from megatron_rl.weight_sync.publish import WeightSync
    from tests.policy_case import build_policy
    from tests.servers.engine_case import build_engine

    overrides = [*LAYOUT, "trainer.devices=4", *SMALL_MESSAGES]
    engine = build_engine(case, url, overrides=overrides)
    config = engine._config
    policy = build_policy(config)
    sync = WeightSync(config, policy.trainable)
    generator = torch.Generator().manual_seed(5)
    requests = [
        Request(torch.randint(5, 100, (length,), generator=generator), max_new_tokens=24, temperature=1.0)
        for length in (1, 4, 9, 17)
    ]
    flips = FlippedBits()
    found: dict[str, Any] = {"proven": [], "log_prob_errors": [], "moved": [], "spans": [], "mended": 0.0}
    last: list[torch.Tensor] = []
    models: dict[int, Any] = {}
    in_flight: list[Any] = []
    for version in range(1, num_updates + 1):
        perturb(policy, version)
        models[version] = snapshot(policy, case.model)
        if version == 2 and dist.get_rank() == 0:
            in_flight.append(threading.Thread(target=lambda: in_flight.append(ask(url)), daemon=True))
            in_flight[0].start()
            time.sleep(0.7)  # some tokens are sampled from version 1
        flips.left = 1 if version == 3 and dist.get_rank() == 1 else 0
        sync.publish(engine, version=version)
        metrics = engine.metrics() | dict(sync.metrics)
        found["mended"] += metrics.get("rollout/sync_mismatch", 0.0)
        assert not {"rollout/sync_failed", "rollout/sync_unfit"} & metrics.keys()
        found["proven"].append(metrics["weight_sync/servers_proven"])
        rows = [c for c in engine.generate(requests) if c is not None]
        samples = [
            TrainingSample(r.prompt_ids, c.response_ids, RowKind.RL) for r, c in zip(requests, rows, strict=True)
        ]
        policy.fill_log_probs(samples, [range(len(samples))], "old_log_probs")
        found["log_prob_errors"].append(
            max(float((s.old_log_probs - c.log_probs).abs().max()) for s, c in zip(samples, rows))
        )
        probe = [TrainingSample(requests[3].prompt_ids, requests[2].prompt_ids, RowKind.RL)]
        policy.fill_log_probs(probe, [range(1)], "old_log_probs")
        found["moved"].append(float((probe[0].old_log_probs - last[-1]).abs().max()) if last else 1.0)
        last.append(probe[0].old_log_probs)
    if dist.get_rank() == 0:
        in_flight[0].join(60)
        found["spans"] = score_spans(in_flight[1], models)
    flips.left = 1000 if dist.get_rank() == 1 else 0
    with pytest.raises(UserError) as caught:
        sync.publish(engine, version=num_updates + 1)
    engine.close()
    return found | {"error": str(caught.value)}


class FlippedBits:
    """Flips one bit of each of the next buckets that this rank hands on."""

    def __init__(self) -> None:
        from megatron_rl.weight_sync import shards

        self.left, honest = 0, shards.gather

        def gather(placed: Any, parameters: Any, run: torch.Tensor) -> None:
            honest(placed, parameters, run)
            if self.left:
                self.left -= 1
                run.view(torch.int32)[placed[0].start] ^= 1

        shards.gather = gather  # type: ignore[assignment]


def perturb(policy: Any, version: int) -> None:
    """The same change to a parameter on every rank that has a copy of it."""
    from megatron_rl.model.weights import named_parameters

    with torch.no_grad():
        for name, parameter in named_parameters(policy.chunks, policy.shape, policy.groups):
            factor = 1 + 0.03 * ((hash_of(name) + 3 * version) % 5 - 2)
            parameter.mul_(factor)


def hash_of(name: str) -> int:
    return sum(map(ord, name))


def snapshot(policy: Any, model_path: Path) -> Any:
    """On rank 0, a transformers model with the policy's weights."""
    from transformers import AutoModelForCausalLM

    from megatron_rl.model.weights import iterate_hf_tensors

    tensors = {name: tensor.clone() for name, tensor in iterate_hf_tensors(policy.chunks, policy.shape, policy.groups)}
    if policy.groups.rank != 0:
        return None
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.load_state_dict(tensors)
    return model.eval()


PROMPT = [5, 9, 77, 23, 4, 60]


def ask(url: str) -> Any:
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 400, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/generate", data=json.dumps(body).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def score_spans(reply: Any, models: dict[int, Any]) -> list[tuple[str, int, float]]:
    """(version, tokens, largest error of their log-probs against the model of that version) of each span."""
    pairs = reply["meta_info"]["output_token_logprobs"]
    ids = torch.tensor([PROMPT + [pair[1] for pair in pairs]])
    spans, found, start = reply["meta_info"]["weight_versions"], [], 0
    for number, span in enumerate(spans):
        end = spans[number + 1]["start"] if number + 1 < len(spans) else len(pairs)
        start = span["start"]
        with torch.no_grad():
            log_p = models[int(span["version"])](ids).logits[0].log_softmax(-1)
        errors = [abs(pairs[i][0] - float(log_p[len(PROMPT) - 1 + i, pairs[i][1]])) for i in range(start, end)]
        found.append((span["version"], end - start, max(errors)))
    return found
