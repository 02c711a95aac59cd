"""A real server that loads a version which came over disk as a delta, and samples with it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.doctor.small_model import randomize
from megatron_rl.weight_sync.disk import apply, write_delta, write_full
from tests.servers.conftest import start_server, wait_until_ready
from tests.tiny_models import make_tiny_model

PROMPT = [7, 30, 41, 12, 55, 90, 23, 8]


def post(url: str, **body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def sampled(url: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Ids and log-probs that the server gives, and what it says about them."""
    sampling = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True}
    reply = post(f"{url}/generate", input_ids=PROMPT, sampling_params=sampling, return_logprob=True)
    pairs = [entry[:2] for entry in reply["meta_info"]["output_token_logprobs"]]
    log_probs, ids = zip(*pairs)
    return torch.tensor(ids), torch.tensor(log_probs), reply["meta_info"]


def expected(checkpoint: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor(PROMPT), ids])[None]).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def test_a_server_loads_a_delta(tmp_path: Path) -> None:
    first = make_tiny_model(tmp_path / "model", "qwen3", tied=True, seed=3, tokenizer=True)
    old = load_file(first / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    randomize(model, seed=4)
    new = {name: model.state_dict()[name] for name in old}
    write_full(old.items(), tmp_path / "links", 0)
    write_delta(old.__getitem__, new.items(), tmp_path / "links", 1)
    process, url = start_server(first, tmp_path / "log", max_total_tokens=2048, load_format="auto")
    try:
        wait_until_ready(process, url, tmp_path / "log")
        ids, log_probs, _ = sampled(url)
        torch.testing.assert_close(log_probs, expected(first, ids), atol=1e-4, rtol=0)
        second = apply(tmp_path / "links", first, 1)
        reply = post(f"{url}/update_weights_from_disk", model_path=str(second), load_format="auto", weight_version="1")
        assert reply["success"], reply
        ids, log_probs, told = sampled(url)
        torch.testing.assert_close(log_probs, expected(second, ids), atol=1e-4, rtol=0)
        assert (log_probs - expected(first, ids)).abs().max() > 0.1  # the versions can be told apart
        assert told["weight_version"] == "1"
    finally:
        process.kill()
