"""The recorded batch, its naive float64 reference, and what one update gives under a layout. Called on forked ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.config import Config
from megatron_rl.rollout.transformers_engine import checkpoint_views
from megatron_rl.types import Kind, MicroBatch, TrainingSample
from tests.policy_case import build_policy, tiny_config

VOCAB_SIZE = 131
LENGTHS = [(1, 1), (7, 120), (3, 2), (30, 9), (1, 64), (12, 17), (2, 33), (5, 5)]
"""(prompt, response) tokens of each row: very unequal."""


def recorded_batch(model: Path) -> list[TrainingSample]:
    """Rows as if rolled out by a policy that was a little different: ratios leave the clip range on both sides."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for prompt, response in LENGTHS:
        ids = torch.randint(0, VOCAB_SIZE, (prompt + response,), generator=generator)
        row = TrainingSample(ids[:prompt], ids[prompt:], Kind.RL)
        row.advantages = torch.randn(1, generator=generator).expand(response).clone()
        samples.append(row)
    total = sum(row.num_response_tokens for row in samples)
    for row, (log_probs, _) in zip(samples, naive_log_probs(load(model), samples)):
        noise = torch.randn(2, len(log_probs), generator=generator) * 0.2
        row.old_log_probs, row.ref_log_probs = (log_probs.detach().float() + noise).unbind()
        row.weights = torch.full((len(log_probs),), 1 / total)
    return samples


def load(model: Path) -> torch.nn.Module:
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    network.get_input_embeddings().padding_idx = None  # else torch drops the gradient of this word's embedding
    return network


def naive_log_probs(model: torch.nn.Module, samples: list[TrainingSample]) -> list[torch.Tensor]:
    """Per row [2, R] float64: log-prob of each response token, and the entropy there. One row at a time, full logits."""
    found = []
    for row in samples:
        ids = torch.cat([row.prompt_ids, row.response_ids])[None]
        log_p = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        log_probs = log_p.gather(1, row.response_ids[:, None])[:, 0]
        found.append(torch.stack([log_probs, -(log_p.exp() * log_p).sum(-1)]))
    return found


def config_of(model: Path, *overrides: str, **layout: object) -> Config:
    return tiny_config(model, "policy.optim.clip_grad=0", "rollout.temperature=1.0", *overrides, **layout)


def reference(
    model: Path,
    samples: list[TrainingSample],
    row_loss: Callable[[list[torch.Tensor]], torch.Tensor] | None = None,
    experts: list[torch.Tensor] | None = None,
) -> dict[str, object]:
    """Loss, metrics, and the gradient of each Hugging Face tensor, in float64 and without any layout.

    Args:
        model: directory.
        samples: the batch.
        row_loss: an auxiliary loss of each row, from the logits [L, E] of each layer's router; its mean over the rows is
            added to the gradient, not to the reported loss.
        experts: [P + R, layers, k] of each row, which its routers are made to choose.
    """
    network, algorithm = load(model), GRPO(config_of(model))
    logits = watch_routers(network)
    forced = force_routers(network) if experts else None
    total_loss, count = torch.zeros(()).double(), sum(row.num_response_tokens for row in samples)
    auxiliary, sums = torch.zeros(()).double(), {}
    for number, row in enumerate(samples):
        logits.clear()
        if forced is not None:
            forced[:] = list(experts[number].unbind(1))
        (found,) = naive_log_probs(network, [row])
        if row_loss is not None:
            auxiliary = auxiliary + row_loss(logits) / len(samples)
        terms = algorithm.loss(*found, _row_as_batch(row))
        total_loss = total_loss + (terms.loss * row.weights.double()).sum()
        for name, value in terms.means.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach().double().sum()) / count
    (total_loss + auxiliary).backward()
    gradients = checkpoint_views({name: parameter.grad for name, parameter in network.named_parameters()})
    return {"loss": float(total_loss.detach()), "metrics": sums, "gradients": gradients}


def watch_routers(network: torch.nn.Module) -> list[torch.Tensor]:
    """Where the routers' logits [L, E] of the last forward will be, layer by layer; empty in a dense model."""
    seen: list[torch.Tensor] = []
    for layer in network.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(
                lambda gate, args, _out: seen.append(args[0].reshape(-1, args[0].shape[-1]) @ gate.weight.t())
            )
    return seen


def force_routers(network: torch.nn.Module) -> list[torch.Tensor]:
    """A list of [L, k] choices, one a layer, that the routers will follow in their next forward."""
    choices: list[torch.Tensor] = []

    def follow(number: int, args: tuple, gate: torch.nn.Module) -> tuple:
        scores = (args[0].reshape(-1, args[0].shape[-1]) @ gate.weight.t()).softmax(-1)
        chosen = scores.gather(1, choices[number])
        return scores, chosen / chosen.sum(-1, keepdim=True), choices[number]

    for number, layer in enumerate(network.model.layers):
        layer.mlp.gate.register_forward_hook(lambda gate, args, _out, number=number: follow(number, args, gate))
    return choices


def _row_as_batch(row: TrainingSample) -> MicroBatch:
    names = ("advantages", "old_log_probs", "ref_log_probs")
    vectors = {name: getattr(row, name).double() for name in names}
    mask = torch.ones(row.num_response_tokens, dtype=torch.bool)
    empty = torch.zeros(0)
    return MicroBatch(empty, empty, empty, empty, 0, mask, mask, [0], empty, empty, empty, vectors)


def num_ranks(layout: dict) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


def one_update(
    model: Path,
    samples: list[TrainingSample],
    layout: dict,
    overrides: tuple[str, ...] = (),
    mutate: Callable[[], None] | None = None,
) -> dict:
    """What the layout gives: loss, metrics, and gradients by Hugging Face name (on rank 0)."""
    from megatron_rl.model.weights import iterate_hf_tensors

    if mutate is not None:
        mutate()
    config = config_of(model, *overrides, **layout)
    policy, algorithm = build_policy(config), GRPO(config)
    policy.optimizer.step = lambda: (True, 0.0, None)  # the gradients shall stay as they are
    metrics = policy.train_step(samples, algorithm.loss)
    _make_whole(policy)
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    gradients = {n: g.clone() for n, g in iterate_hf_tensors(policy.chunks, policy.shape, policy.groups)}
    return {"loss": metrics["loss"], "metrics": metrics, "gradients": gradients if policy.groups.rank == 0 else {}}


def entropies(
    model: Path, samples: list[TrainingSample], layout: dict, overrides: tuple[str, ...] = ()
) -> list[torch.Tensor]:
    """Of each response token, row by row, as the layout computes them; after a check that the first ratio is exact."""
    config = config_of(model, *overrides, **layout)
    policy, algorithm = build_policy(config), GRPO(config)
    policy.fill_log_probs(samples, [range(len(samples))], "old_log_probs", with_entropy=True)
    assert policy.train_step(samples, algorithm.loss)["ratio/max_abs_log_ratio"] == 0.0
    return [row.entropy for row in samples]


def _make_whole(policy) -> None:  # type: ignore[no-untyped-def]
    """The distributed optimizer leaves each rank its shard of a gradient; collect the others'."""
    for model in policy.models:
        for group in [*model.bucket_groups, *model.expert_parallel_bucket_groups]:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shards = list(bucket.grad_data.chunk(ranks.size()))
                dist.all_gather(shards, shards[ranks.rank()].clone(), group=ranks)


def errors(result: dict, true: dict) -> dict[str, float]:
    """Relative errors: of the loss, the largest of a metric, and the largest of a parameter's gradient (as defined in B)."""
    norm = torch.stack([g.norm() for g in true["gradients"].values()]).norm()
    gradient = {
        name: float((result["gradients"][name].double() - g).norm() / max(g.norm(), 1e-3 * norm))
        for name, g in true["gradients"].items()
    }
    metric = {
        name: abs(result["metrics"][name] - value) / max(abs(value), 1e-3) for name, value in true["metrics"].items()
    }
    return {
        "loss": abs(result["loss"] - true["loss"]) / abs(true["loss"]),
        "metric": max(metric.values()),
        "gradient": max(gradient.values()),
    }
