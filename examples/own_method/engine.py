"""An engine: token ids in, token ids and log-probs out. ``rollout.engine: engine:PlainEngine``.

The plainest there is: a forward pass over all tokens so far for each new one, no KV cache. Fine for small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import InProcessEngine, ServedModel, WeightSource
from megatron_rl.types import Completion, FinishReason, Request


class PlainEngine(InProcessEngine):
    """Every rank completes all requests; seeds belong to requests, so all ranks get the same."""

    def __init__(
        self, config: Config, model: ServedModel, *, device: torch.device, cpu_group: dist.ProcessGroup
    ) -> None:
        models: Any = AutoModelForCausalLM  # transformers has no annotations
        with torch.random.fork_rng():  # random weights, soon overwritten, must not move the trainer's generators
            network = models.from_config(AutoConfig.from_pretrained(model.path), dtype=model.dtype)
        self.network, self.device = network.to(device).eval(), device
        self.name, self.stop_ids = config.rollout.engine, set(model.stop_ids)

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Load all tensors by their Hugging Face names; a tied one comes under its first name."""
        result = self.network.load_state_dict(dict(source.tensors()), strict=False)
        own = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}  # each under one name
        missing = [name for name in result.missing_keys if name in own]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"weights: nothing came for {missing}, nothing takes {result.unexpected_keys}")
        self.weight_version = version

    @torch.no_grad()
    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete each request by itself.

        Raises:
            UserError: a request cuts the vocabulary. All ranks get the same requests, so all raise it.
        """
        for request in requests:
            if request.top_p < 1 or request.top_k > 0:
                rule = f"has no top_p and top_k; a request has {request.top_p:g} and {request.top_k}"
                fix = "set top_p=1 and top_k=0 in the sections rollout, eval and presample"
                raise UserError("rollout.engine", self.name, rule, fix)
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        generator = torch.Generator().manual_seed(request.seed)
        ids: list[int] = request.prompt_ids.tolist()
        log_probs: list[float] = []
        while len(log_probs) < request.max_new_tokens and (not log_probs or ids[-1] not in self.stop_ids):
            logits = self.network(torch.tensor([ids], device=self.device)).logits[0, -1].float().cpu()
            of_all = torch.log_softmax(logits / (request.temperature or 1.0), dim=-1)
            drawn = int(torch.multinomial(of_all.exp(), 1, generator=generator))
            ids.append(drawn if request.temperature else int(of_all.argmax()))
            log_probs.append(float(of_all[ids[-1]]))
        reason: FinishReason = "stop" if ids[-1] in self.stop_ids else "length"
        response = torch.tensor(ids[len(request.prompt_ids) :])
        return Completion(response, torch.tensor(log_probs), reason, self.weight_version)
