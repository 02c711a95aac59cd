"""Engine ``transformers``: an in-process Hugging Face model on every rank, each generating its share of the requests.

The sampler sees every step's logits, so it can return log-probs without keeping ``[tokens, vocabulary]`` scores. It draws
from random numbers that belong to the request, so that a completion does not depend on its rank or batch (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.convert.hf.in_memory import ROUTER_BIAS, checkpoint_views
from megatron_rl.metrics import progress
from megatron_rl.rollout.engine import InProcessEngine, WeightSource
from megatron_rl.rollout.share import gather_completions
from megatron_rl.types import Completion, FinishReason, Request


class TransformersEngine(InProcessEngine):
    """Generation in the trainer's process; needs the whole model in the memory of every rank."""

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        stop_ids: Sequence[int],
        pad_id: int,
        max_batch_size: int,
        cpu_group: dist.ProcessGroup,
    ) -> None:
        """Build the model without weights; the first ``update_weights`` fills it.

        Args:
            model_path: directory with config.json.
            dtype: of weights and activations.
            device: where to generate.
            stop_ids: token ids that end a response (they are part of it).
            pad_id: fills batches; never part of a response.
            max_batch_size: sequences generated at once by this rank.
            cpu_group: all ranks, over gloo.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        from megatron_rl.rollout.decode import ATTENTION

        with torch.random.fork_rng():  # the random weights, soon overwritten, must not move the trainer's generators
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(model_path), dtype=dtype, attn_implementation=ATTENTION
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.max_batch_size, self.cpu_group = device, max_batch_size, cpu_group
        self.stop_ids, self.pad_id = list(stop_ids), pad_id
        self.weight_version = -1

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Copy all weights into the model.

        Raises:
            RuntimeError: a tensor is missing, unknown, or of another shape.
        """
        held = dict(self.model.named_parameters())
        held |= {name: buffer for name, buffer in self.model.named_buffers() if name.endswith(ROUTER_BIAS)}
        targets = checkpoint_views(held, self.model.config.model_type)
        with torch.no_grad():
            for name, tensor in source.tensors():
                target = targets.pop(name, None)
                if target is None or target.shape != tensor.shape:
                    raise RuntimeError(f"weight sync: {name} {tuple(tensor.shape)} does not fit the rollout model")
                target.copy_(tensor)
        if targets:
            raise RuntimeError(f"weight sync: nothing was sent for {sorted(targets)}")
        self.weight_version = version

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete all requests.

        Rank r takes requests r, r + world size, ...: long and short prompts spread evenly.
        """
        assert self.weight_version >= 0, "generate before the first update_weights"
        rank, world_size = dist.get_rank(self.cpu_group), dist.get_world_size(self.cpu_group)
        mine = self._generate_share(requests[rank::world_size])
        by_rank = gather_completions(mine, self.cpu_group)
        return [by_rank[index % world_size][index // world_size] for index in range(len(requests))]

    def _generate_share(self, requests: Sequence[Request]) -> list[Completion]:
        # Similar prompt lengths share a batch, so little is spent on padding; requests of a batch share their settings.
        order = sorted(range(len(requests)), key=lambda i: (_settings(requests[i]), len(requests[i].prompt_ids), i))
        completions: list[Completion | None] = [None] * len(requests)
        start = 0
        with progress(len(order), "generation") as bar:
            while start < len(order):
                settings = _settings(requests[order[start]])
                batch = [i for i in order[start : start + self.max_batch_size] if _settings(requests[i]) == settings]

                def advance(num_done: int, before: int = start) -> None:
                    bar.advance_to(before + num_done)

                for i, completion in zip(batch, self._generate_batch([requests[i] for i in batch], advance)):
                    completions[i] = completion
                start += len(batch)
        assert all(c is not None for c in completions)
        return completions  # type: ignore[return-value]

    def _generate_batch(self, requests: Sequence[Request], on_progress: Callable[[int], None]) -> list[Completion]:
        from megatron_rl.rollout.decode import decode

        rows = decode(
            self.model,
            [request.prompt_ids for request in requests],
            _Sampler(requests, self.device),
            max_new_tokens=[request.max_new_tokens for request in requests],
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            on_progress=on_progress,
            record_experts=requests[0].record_experts,
        )
        reasons: list[FinishReason] = ["stop" if int(row.tokens[-1]) in self.stop_ids else "length" for row in rows]
        return [
            Completion(row.tokens, row.log_probs, reason, self.weight_version, row.experts)
            for row, reason in zip(rows, reasons)
        ]


def _settings(request: Request) -> tuple[float, float, int, bool]:
    return request.temperature, request.top_p, request.top_k, request.record_experts


class _Sampler:
    """Sampler of every row's next token. A ``decode.Choose``."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        first = requests[0]
        self.temperature, self.top_p, self.top_k = first.temperature, first.top_p, first.top_k
        draws = [_uniforms(request.seed, request.max_new_tokens) for request in requests]
        self._draws = torch.nn.utils.rnn.pad_sequence(draws, batch_first=True).to(device)

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        logits = logits.float()
        log_probs = torch.log_softmax(logits / self.temperature if self.temperature > 0 else logits, dim=-1)
        if self.temperature == 0:
            chosen = log_probs.argmax(-1)
        else:
            chosen = self._draw(log_probs.exp(), self._draws[rows, step])
        # Log-probs are those of the full softmax at the sampling temperature: what the trainer recomputes.
        return chosen, log_probs.gather(1, chosen[:, None])[:, 0]

    def _draw(self, probabilities: Tensor, uniform: Tensor) -> Tensor:
        """Return tokens [B] by inverse transform: the first whose cumulative probability exceeds the row's number."""
        if self.top_k == 0 and self.top_p == 1.0:
            cumulative = probabilities.double().cumsum(-1)
            return _first_above(cumulative, uniform)
        ordered, token_ids = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        is_kept = before < self.top_p
        if self.top_k:
            is_kept[:, self.top_k :] = False
        cumulative = (ordered * is_kept).double().cumsum(-1)
        return token_ids.gather(1, _first_above(cumulative, uniform)[:, None])[:, 0]


def _first_above(cumulative: Tensor, uniform: Tensor) -> Tensor:
    total = cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform[:, None] * total, right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)


def _uniforms(seed: int, count: int) -> Tensor:
    """Return the random numbers of one request, [count] float64 in [0, 1)."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
