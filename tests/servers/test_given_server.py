"""Training from a real SGLang server that runs already, well and spoiled by a proxy."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from megatron_rl.types import Request
from tests.e2e.conftest import Case
from tests.e2e.test_segment_runs import CHAIN, TREE
from tests.servers.conftest import Proxy, Spoil
from tests.tiny_models import make_tiny_model

MakeProxy = Callable[[Spoil], Proxy]


def run(case: Case, url: str, *overrides: str, ranks: int = 2) -> list[int]:
    return case.run(
        "rollout.engine=sglang", f"rollout.servers.urls=[{url}]", "trainer.max_steps=2", *overrides, ranks=ranks
    )


def error_of(case: Case, capfd: pytest.CaptureFixture[str], url: str, *overrides: str) -> str:
    """The one error line of a run that both ranks end with status 2."""
    assert run(case, url, *overrides) == [2, 2]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "sampling",
    [(), ("rollout.temperature=0.7",), ("rollout.top_p=0.8", "rollout.top_k=5")],
    ids=["plain", "temperature", "top_p"],
)
def test_server_and_trainer_agree_on_every_log_prob(case: Case, server: str, sampling: tuple[str, ...]) -> None:
    assert run(case, server, *sampling) == [0, 0]
    rows = case.rows()
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["mismatch/log_prob_abs_diff_max"] < 1e-3
        assert row["ratio/first_update_max_abs_log_ratio"] == 0.0
        assert row["rollout/staleness"] == 0.0
        assert row["rollout/server_restarts"] == 0.0
        assert "rollout/sync_failed" not in row  # the server may remember a group of an earlier trainer


def test_the_second_step_samples_from_the_updated_weights(case: Case, server: str) -> None:
    """Large steps: had the server kept the first weights, log-probs would be off by far more than rounding."""
    assert run(case, server, "policy.optim.lr=3e-2") == [0, 0]
    assert case.rows()[1]["mismatch/log_prob_abs_diff_max"] < 1e-3


def test_tensor_parallel_ranks_publish_the_same_weights(case: Case, server: str) -> None:
    assert run(case, server, "policy.megatron_cfg.tensor_model_parallel_size=2") == [0, 0]
    assert all(row["mismatch/log_prob_abs_diff_max"] < 1e-3 for row in case.rows())


@pytest.mark.parametrize("mode", ["abort", "in_place"])
def test_pause_modes(case: Case, server: str, mode: str) -> None:
    """Weights change by far more than rounding, whatever the rewards: a prefix that the old ones cached would show."""
    change = ("policy.optim.lr=3e-2", "policy.optim.weight_decay=0.5")
    assert run(case, server, f"weight_sync.pause_mode={mode}", *change) == [0, 0]
    assert all(row["mismatch/log_prob_abs_diff_max"] < 1e-3 for row in case.rows())


@pytest.mark.parametrize("algorithm", [CHAIN, TREE], ids=["chain", "tree"])
def test_segments_continue_from_token_ids(case: Case, server: str, algorithm: str) -> None:
    """The trainer finds the log-probs of every piece in its context, and what a piece continues was in the server's cache."""
    spo = case.with_algorithm(algorithm)
    # Responses have to end at different lengths, else all are worth the same and a step of trees has nothing to learn.
    longer = ("rollout.max_new_tokens=30", "algorithm.overlong.buffer=30", "algorithm.num_prompts_per_step=12")
    assert run(spo, server, "exp_manager.name=first", "rollout.record=true", *longer) == [0, 0]
    rows = spo.rows("first")
    learned = [row for row in rows if "loss" in row]
    assert learned and all(row["mismatch/log_prob_abs_diff_max"] < 1e-3 for row in learned)
    assert all(row["rollout/cached_prompt_frac"] > 0.3 for row in rows)
    replay = ("rollout.engine=recorded", f"rollout.recorded_dir={case.root / 'first' / 'rollouts'}")
    assert spo.run(*replay, "trainer.max_steps=2", "exp_manager.name=again", *longer, ranks=2) == [0, 0]
    for one, other in zip(rows, spo.rows("again"), strict=True):
        for name in ("loss", "grad_norm", "rollout/generated_tokens_total", "reward/mean"):
            assert one.get(name) == other.get(name), name


def test_rollouts_of_a_server_can_be_recorded_and_replayed(case: Case, server: str) -> None:
    assert run(case, server, "rollout.record=true") == [0, 0]
    first = case.rows()
    replay = ("rollout.engine=recorded", f"rollout.recorded_dir={case.root / 'tiny' / 'rollouts'}")
    assert case.run(*replay, "trainer.max_steps=2", "exp_manager.name=again", ranks=2) == [0, 0]
    for one, other in zip(first, case.rows("again")):
        assert {k: v for k, v in one.items() if not k.startswith("rollout/")} == {
            k: v for k, v in other.items() if not k.startswith("rollout/")
        }


@pytest.mark.parametrize("transport", ["shards", "tensors"])
def test_small_buckets_carry_all_weights(case: Case, server: str, transport: str) -> None:
    assert run(case, server, "weight_sync.bucket_bytes=1000", f"weight_sync.transport={transport}") == [0, 0]
    assert all(row["mismatch/log_prob_abs_diff_max"] < 1e-3 for row in case.rows())
    lines = (case.root / "tiny" / "metrics.jsonl").read_text().splitlines()
    proven = [json.loads(line).get("weight_sync/servers_proven") for line in lines]
    assert proven == [1.0 if transport == "shards" else None] * 2


def test_weights_over_a_shared_directory(case: Case, server: str) -> None:
    """The start's weights as a full link, then what each update changed."""
    directory = case.root / "shared"
    decay = "policy.optim.weight_decay=0.5"  # so that weights change, whatever the rewards
    disk = ("weight_sync.transport=disk", f"weight_sync.directory={directory}", decay)
    assert run(case, server, *disk) == [0, 0]
    assert all(row["mismatch/log_prob_abs_diff_max"] < 1e-3 for row in case.rows())
    names = {path.name for path in directory.iterdir()}
    assert {"00000000.full", "00000001.delta", "served_00000001"} <= names, names


# ------------------------------------------------------------------------------------------------ what is mended


def spoil_generate(change: Callable[[int, Any], Any], *, first: int) -> Spoil:
    """Change the first replies to ``/generate``."""

    def spoil(path: str, number: int, reply: Any) -> Any:
        return change(number, reply) if path == "/generate" and number < first else reply

    return spoil


def cut(_: int, reply: Any) -> Any:
    reply["meta_info"]["finish_reason"] = {"type": "abort", "message": "planted"}
    return reply


def lose_a_token(_: int, reply: Any) -> Any:
    reply["output_ids"].pop()
    return reply


def fail_inside(_: int, reply: Any) -> Any:
    return web.Response(status=500, text="planted")


def serve_old_weights(_: int, reply: Any) -> Any:
    reply["meta_info"]["weight_versions"][0]["version"] = "41"
    return reply


@pytest.mark.parametrize(
    ("change", "reason"),
    [(cut, "cut"), (lose_a_token, "bad_reply"), (fail_inside, "server_error"), (serve_old_weights, "stale")],
)
def test_a_spoiled_reply_is_asked_again_and_counted(
    case: Case, proxy: MakeProxy, change: Callable[[int, Any], Any], reason: str
) -> None:
    url = proxy(spoil_generate(change, first=5)).url
    assert run(case, url) == [0, 0]
    rows = case.rows()
    assert rows[0][f"rollout/retried_{reason}"] == 5.0
    assert f"rollout/retried_{reason}" not in rows[1]
    assert all(row["mismatch/log_prob_abs_diff_max"] < 1e-3 for row in rows)


def test_replies_that_stay_wrong_end_the_run(case: Case, proxy: MakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    url = proxy(spoil_generate(lose_a_token, first=10_000)).url
    error = error_of(case, capfd, url, "rollout.servers.max_retries=2")
    assert "rollout.servers.max_retries = 2" in error and "failed 3 times" in error and "log-probs" in error


def test_an_update_that_another_trainer_left_unfinished(case: Case, server: str) -> None:
    for path, body in (
        ("pause_generation", {"mode": "retract"}),
        ("update_weight_version", {"new_version": "updating:7", "abort_all_requests": False}),
        ("begin_weight_update", {}),
    ):
        post(f"{server}/{path}", body)
    assert run(case, server) == [0, 0]
    assert all(row["mismatch/log_prob_abs_diff_max"] < 1e-3 for row in case.rows())


def post(url: str, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers, method="POST")
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_refused_weight_update_ends_the_run(case: Case, proxy: MakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(path: str, number: int, reply: Any) -> Any:
        if path == "/update_weights_from_tensor":
            return web.json_response({"success": False, "message": "planted refusal"}, status=400)
        return reply

    assert "planted refusal" in error_of(case, capfd, proxy(refuse).url)


def test_a_stamp_that_does_not_hold_ends_the_run(
    case: Case, proxy: MakeProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    def forget(path: str, number: int, reply: Any) -> Any:
        return reply | {"weight_version": "none"} if path == "/model_info" else reply

    assert "says its weights are version none after an update to 0" in error_of(case, capfd, proxy(forget).url)


def test_an_unknown_release_is_refused(case: Case, proxy: MakeProxy, capfd: pytest.CaptureFixture[str]) -> None:
    def age(path: str, number: int, reply: Any) -> Any:
        return reply | {"version": "0.4.9"} if path == "/server_info" else reply

    assert "runs SGLang 0.4.9" in error_of(case, capfd, proxy(age).url)


def test_another_architecture_is_refused(
    case: Case, server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_model(
        tmp_path / "llama", "llama", tied=False, seed=1, tokenizer=True, max_position_embeddings=512
    )
    error = error_of(case, capfd, server, f"policy.model_path={other}")
    assert "Qwen3ForCausalLM" in error and "LlamaForCausalLM" in error


def test_the_same_architecture_in_another_size_is_refused(
    case: Case, server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_model(
        tmp_path / "wide",
        "qwen3",
        tied=True,
        seed=1,
        tokenizer=True,
        max_position_embeddings=512,
        intermediate_size=128,
    )
    assert "serves another model" in error_of(case, capfd, server, f"policy.model_path={other}")


def test_an_unreachable_url_is_named(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    error = error_of(case, capfd, "http://127.0.0.1:9", "rollout.servers.start_timeout_s=3")
    assert "http://127.0.0.1:9" in error and "no server answered for 3 s" in error


# ------------------------------------------------------------------------------------------------ the engine itself


def test_generation_stops_when_enough_groups_are_whole(case: Case, server: str) -> None:
    """Two groups of endless responses, two of short ones: the short ones suffice, and the server is free at once."""
    from tests.forked import run_ranks

    results = run_ranks(stop_early, 2, case, server, timeout_s=120)
    for mask in results:
        assert mask == [True] * 2 + [False] * 2 + [True] * 2 + [False] * 2


def stop_early(case: Case, url: str) -> list[bool]:
    from tests.servers.engine_case import build_engine, weights_of

    engine = build_engine(case, url)
    engine.update_weights(weights_of(case.model), 0)
    short = Request(torch.tensor([5, 6, 7]), max_new_tokens=2, temperature=1.0)
    long = Request(torch.tensor([5, 6, 7]), max_new_tokens=400, temperature=1.0)
    results = engine.generate([short] * 2 + [long] * 2 + [short] * 2 + [long] * 2, group_size=2, num_groups=2)
    engine.update_weights(weights_of(case.model), 1)
    again = engine.generate([short] * 4)
    assert all(c is not None and c.weight_version == 1 for c in again)
    engine.close()
    return [completion is not None for completion in results]


def test_greedy_equals_the_in_process_engine(case: Case, server: str) -> None:
    from tests.forked import run_ranks

    run_ranks(greedy_case, 1, case, server, timeout_s=120)


def greedy_case(case: Case, url: str) -> None:
    from tests.servers.engine_case import build_engine, build_in_process, weights_of

    engine, reference = build_engine(case, url), build_in_process(case)
    for each in (engine, reference):
        each.update_weights(weights_of(case.model), 3)
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(torch.randint(5, 40, (length,), generator=generator), max_new_tokens=12, temperature=0.0)
        for length in (1, 3, 9, 17)
    ]
    for mine, theirs in zip(engine.generate(requests), reference.generate(requests)):
        assert mine is not None and theirs is not None
        assert mine.response_ids.tolist() == theirs.response_ids.tolist()
        assert mine.finish_reason == theirs.finish_reason
        torch.testing.assert_close(mine.log_probs, theirs.log_probs, atol=1e-4, rtol=0)
    engine.close()


def test_metrics_name_only_what_happened(case: Case, server: str) -> None:
    assert run(case, server) == [0, 0]
    text = (case.root / "tiny" / "metrics.jsonl").read_text().splitlines()[0]
    assert {key for key in json.loads(text) if key.startswith("rollout/retried")} == set()
