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
from megatron_rl.rollout.engine import InProcessEngine, ServedModel, WeightSource
from megatron_rl.types import Completion, Request


class PlainEngine(InProcessEngine):
    """Every rank completes all requests; seeds belong to requests, so all ranks get the same."""

    def __init__(
        self, config: Config, model: ServedModel, *, device: torch.device, cpu_group: dist.ProcessGroup
    ) -> None:
        with torch.random.fork_rng():  # random weights, soon overwritten, must not move the trainer's generators
            network: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.path), dtype=model.dtype)
        self.network, self.device = network.to(device).eval(), device
        self.stop_ids, self.weight_version = set(model.stop_ids), -1

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Load all tensors by their Hugging Face names."""
        self.network.load_state_dict(dict(source.tensors()), strict=False)
        self.network.tie_weights()
        self.weight_version = version

    @torch.no_grad()
    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete each request by itself."""
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        generator = torch.Generator().manual_seed(request.seed)
        ids, log_probs = request.prompt_ids.tolist(), []
        while len(log_probs) < request.max_new_tokens and (not log_probs or ids[-1] not in self.stop_ids):
            logits = self.network(torch.tensor([ids], device=self.device)).logits[0, -1].float().cpu()
            of_all = torch.log_softmax(logits / (request.temperature or 1.0), dim=-1)
            drawn = int(torch.multinomial(of_all.exp(), 1, generator=generator))
            ids.append(drawn if request.temperature else int(of_all.argmax()))
            log_probs.append(float(of_all[ids[-1]]))
        reason = "stop" if ids[-1] in self.stop_ids else "length"
        response = torch.tensor(ids[len(request.prompt_ids) :])
        return Completion(response, torch.tensor(log_probs), reason, self.weight_version)
