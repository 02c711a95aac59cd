"""Decoding with shared prompts, dropped rows and a growing cache: log-probs are still those of a plain forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.rollout import decode as module
from megatron_rl.rollout.decode import ATTENTION, decode
from tests.tiny_models import EOS_ID, make_tiny_model

MAX_NEW_TOKENS = 60
STOPS = [EOS_ID, *range(5, 13)]
PROMPT_OF_ROW = [0, 0, 1, 2, 2, 2, 0, 1, 1, 3] * 4


def draw(logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """A draw that belongs to row and step."""
    noise = [torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(int(r) * 1000 + step)) for r in rows]
    log_probs = logits.float().log_softmax(-1)
    chosen = (log_probs - (-torch.stack(noise).log()).log()).argmax(-1)
    return chosen, log_probs.gather(1, chosen[:, None])[:, 0]


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    distinct = [torch.randint(6, 131, (length,), generator=generator) for length in (7, 21, 1, 64)]
    return [distinct[index] for index in PROMPT_OF_ROW]


@pytest.mark.parametrize(
    ("family", "is_by_kernel"),
    [("llama", False), ("qwen2", False), ("qwen3", False), ("qwen3_moe", False), ("qwen2", True)],
)
def test_log_probs_are_those_of_a_whole_forward(
    family: str, is_by_kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GROW", 8)
    if is_by_kernel:  # what other devices than the CPU do
        monkeypatch.setattr(module, "_ATTEND", {})
    path = make_tiny_model(tmp_path, family, tied=False, seed=5, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), attn_implementation=ATTENTION).eval()
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    model.load_state_dict(plain.state_dict())
    batch_sizes: list[int] = []
    model.register_forward_pre_hook(lambda *args: batch_sizes.append(len(args[2]["input_ids"])), with_kwargs=True)
    progress: list[int] = []
    routes: list[Tensor] = []
    for layer in plain.model.layers if family == "qwen3_moe" else []:
        layer.mlp.gate.register_forward_hook(lambda _gate, _args, out: routes.append(out[2]))
    rows = decode(
        model,
        prompts(),
        draw,
        max_new_tokens=MAX_NEW_TOKENS,
        stop_ids=STOPS,
        pad_id=0,
        on_progress=progress.append,
        record_experts=family == "qwen3_moe",
    )
    for prompt, (tokens, log_probs, experts) in zip(prompts(), rows):
        routes.clear()
        with torch.no_grad():
            logits = plain(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
        if routes:  # of every token but the last, which was never computed
            assert experts is not None and len(experts) == len(prompt) + len(tokens) - 1
            assert torch.equal(experts.sort(-1).values, torch.stack(routes, dim=1)[:-1].short().sort(-1).values)
        assert not set(STOPS) & set(tokens[:-1].tolist())
        assert len(tokens) == MAX_NEW_TOKENS or int(tokens[-1]) in STOPS
    lengths = [len(tokens) for tokens, _, _ in rows]
    assert min(lengths) < 20 and max(lengths) > 40, "rows must leave at different times, and the cache grow repeatedly"
    assert batch_sizes == [4, *sorted(batch_sizes[1:], reverse=True)]
    assert batch_sizes[-1] < 25
    assert progress == sorted(progress) and progress[-1] == len(rows)


def test_rows_of_one_prompt_differ_and_belong_to_themselves(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "qwen3", tied=True, seed=5, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=ATTENTION).eval()
    settings = {"max_new_tokens": 30, "stop_ids": STOPS, "pad_id": 0}
    together = decode(model, prompts(), draw, **settings)
    assert len({tuple(tokens.tolist()) for tokens, _, _ in together[3:6]}) == 3

    for row in (3, 9, 17):

        def draw_row(logits: Tensor, rows: Tensor, step: int, row: int = row) -> tuple[Tensor, Tensor]:
            return draw(logits, rows + row, step)

        (alone,) = decode(model, [prompts()[row]], draw_row, **settings)
        assert torch.equal(alone[0], together[row][0])


def test_rows_have_limits_of_their_own(tmp_path: Path) -> None:
    """A row with a lower limit is the beginning of what it would be without."""
    path = make_tiny_model(tmp_path, "qwen3", tied=True, seed=5, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=ATTENTION).eval()
    whole = decode(model, prompts(), draw, max_new_tokens=30, stop_ids=STOPS, pad_id=0)
    limits = [1 + 7 * row % 30 for row in range(len(whole))]
    rows = decode(model, prompts(), draw, max_new_tokens=limits, stop_ids=STOPS, pad_id=0)
    for row, other, limit in zip(rows, whole, limits, strict=True):
        assert torch.equal(row.tokens, other.tokens[:limit])
    assert any(len(row.tokens) == limit for row, limit in zip(rows, limits))


@pytest.mark.parametrize("max_new_tokens", [1, 20])
def test_bfloat16_and_a_single_token(tmp_path: Path, max_new_tokens: int) -> None:
    path = make_tiny_model(tmp_path, "qwen3", tied=True, seed=5, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=ATTENTION, dtype=torch.bfloat16).eval()
    rows = decode(model, prompts(), draw, max_new_tokens=max_new_tokens, stop_ids=STOPS, pad_id=0)
    for prompt, (tokens, log_probs, _) in zip(prompts(), rows):
        assert 1 <= len(tokens) <= max_new_tokens and log_probs.dtype == torch.float32
        with torch.no_grad():
            logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(log_probs, expected, atol=0.3, rtol=0)
