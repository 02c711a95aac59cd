"""A real server of a model with experts: it says which it chose, and training can repeat that."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.sglang.client import SGLangClient, serialize
from megatron_rl.rollout.sglang.versions import adapter_for
from megatron_rl.types import Completion, Request
from tests.servers.conftest import start_server, wait_until_ready
from tests.tiny_models import make_tiny_model

LAYERS, CHOSEN = 2, 2


async def complete(url: str, model: torch.nn.Module, requests: list[Request]) -> list[Completion]:
    """Give the server the model's weights, and ask."""
    async with aiohttp.ClientSession() as session:
        client = SGLangClient(url, session, key=None)
        adapter = adapter_for(str((await client.info(30.0))["version"]), url)
        await client.begin_update(1, pause_mode="abort", adapter=adapter, timeout_s=60.0)
        bucket = serialize([(name, tensor.detach()) for name, tensor in checkpoint_views(model).items()])
        await client.send(bucket, tensor_parallel_size=1, timeout_s=60.0)
        await client.end_update(1, pause_mode="abort", adapter=adapter, timeout_s=60.0, patience_s=60.0)
        shape = (LAYERS, CHOSEN)
        return [
            await client.generate(r, stop_ids=[2], experts=shape, adapter=adapter, version=1, timeout_s=60.0)
            for r in requests
        ]


def checkpoint_views(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from megatron_rl.convert.hf.in_memory import checkpoint_views as views

    return views(dict(model.named_parameters()), "qwen3_moe")


def test_the_server_says_which_experts_it_chose(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "model", "qwen3_moe", tied=False, seed=5, tokenizer=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _gate, _args, out: chosen.append(out[2]))
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(torch.randint(6, 131, (length,), generator=generator), max_new_tokens=12, temperature=1.0)
        for length in (1, 9, 9, 30)
    ]
    requests.append(requests[-1])  # its prompt is in the prefix cache by then
    process, url = start_server(path, tmp_path / "log", max_total_tokens=4096, enable_return_routed_experts=True)
    try:
        wait_until_ready(process, url, tmp_path / "log")
        completions = asyncio.run(complete(url, model, requests))
    finally:
        process.kill()
    for request, completion in zip(requests, completions):
        chosen.clear()
        ids = torch.cat([request.prompt_ids, completion.response_ids])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(request.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, completion.response_ids.long()[:, None])[:, 0]
        torch.testing.assert_close(completion.log_probs, expected, atol=1e-3, rtol=0)
        assert completion.experts is not None and completion.experts.shape == (len(ids) - 1, LAYERS, CHOSEN)
        told, own = completion.experts.sort(-1).values, torch.stack(chosen, dim=1)[:-1].short().sort(-1).values
        assert torch.equal(told, own)
