"""One update of the policy against a float64 model that knows nothing of layouts: loss, metrics, every gradient, their norm.

The reference is transformers' own model, one row at a time, with full logits. Gradients are compared under the names and
shapes of the Hugging Face checkpoint, so a wrong conversion would show as well. Weights and loss terms of tokens are the
algorithm's own: what is checked is how a layout computes them, not the method's formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.base import Algorithm
from megatron_rl.convert.hf.in_memory import checkpoint_views
from megatron_rl.model.policy import Policy
from megatron_rl.model.weights import iterate_hf_tensors
from megatron_rl.types import POLICY_GRADIENT_KINDS, MicroBatch, RowKind, TrainingSample

BOUNDS = {"loss": 1e-6, "metric": 1e-6, "gradient": 1e-5, "grad_norm": 1e-5}
"""Bounds of ``errors``, at least some three times what float32 gives when nothing is wrong."""
LENGTHS = ((1, 1), (7, 120), (3, 2), (30, 9), (1, 64), (12, 17), (2, 33), (5, 5))
"""(prompt, response) tokens of each row: very unequal."""


class Outcome(TypedDict):
    """Result of one update."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    """Gradients by Hugging Face name; empty on ranks above 0."""
    grad_norm: float
    """Norm of the whole gradient, as the optimizer reports it: what clipping divides by."""


class TrueOutcome(Outcome):
    """Result of the reference."""

    loss_size: float
    """Sum over the tokens of ``|weight * term|``. The loss itself may be next to nothing, where terms of both signs cancel."""


def load_reference(model: Path) -> Any:
    """Transformers' model in float64, with its plainest parts."""
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    network.get_input_embeddings().padding_idx = None  # else torch drops the gradient of this word's embedding
    return network


def recorded_batch(
    network: Any,
    algorithm: Algorithm,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    is_stored: Callable[[int], bool] = lambda number: number % 3 == 1,
) -> list[TrainingSample]:
    """Rows as if rolled out by a policy that was a little different: ratios leave the clip range on both sides.

    For an algorithm that trains on stored rows, too, those that ``is_stored`` names are such. Where it masks tokens by their
    probability, they are masked.
    """
    generator = torch.Generator().manual_seed(1)
    stored = RowKind.RL if algorithm.stored_kind is None else algorithm.stored_kind
    samples = []
    for number, (prompt, response) in enumerate(lengths):
        ids = torch.randint(0, vocab_size, (prompt + response,), generator=generator)
        row = TrainingSample(ids[:prompt], ids[prompt:], stored if is_stored(number) else RowKind.RL)
        row.advantages = torch.randn(1, generator=generator).expand(response).clone()
        samples.append(row)
    for row in samples:
        with torch.no_grad():
            log_probs, _ = naive_log_probs(network, row, temperature=temperature)
        noise = torch.randn(2, len(log_probs), generator=generator) * 0.2
        row.old_log_probs, row.ref_log_probs = (log_probs.float() + noise).unbind()
        if row.kind not in POLICY_GRADIENT_KINDS:
            row.advantages = row.old_log_probs = None
    algorithm.mask_rows(samples)
    algorithm.assign_weights(samples)
    return samples


def naive_log_probs(network: Any, row: TrainingSample, *, temperature: float = 1.0) -> Tensor:
    """[2, R] float64: log-prob of each response token, and the entropy there, from full logits."""
    ids = torch.cat([row.prompt_ids, row.response_ids])[None]
    log_p = (network(ids).logits[0, len(row.prompt_ids) - 1 : -1] / temperature).log_softmax(-1)
    log_probs = log_p.gather(1, row.response_ids.long()[:, None])[:, 0]
    return torch.stack([log_probs, -(log_p.exp() * log_p).sum(-1)])


def reference(
    network: Any,
    algorithm: Algorithm,
    samples: Sequence[TrainingSample],
    *,
    temperature: float = 1.0,
    row_loss: Callable[[list[Tensor]], Tensor] | None = None,
    before_row: Callable[[int], None] = lambda _: None,
) -> TrueOutcome:
    """The truth.

    Args:
        network: of ``load_reference``.
        algorithm: whose loss is taken.
        samples: the batch.
        temperature: divides the logits.
        row_loss: an auxiliary loss of each row, from the logits [L, E] of each layer's router; its mean over the rows is
            added to the gradient, not to the reported loss.
        before_row: called with the number of each row.
    """
    logits = watch_routers(network)
    total_loss = auxiliary = torch.zeros((), dtype=torch.float64)
    loss_size = 0.0
    sums: dict[str, float] = {}
    for number, row in enumerate(samples):
        logits.clear()
        before_row(number)
        log_probs, entropy = naive_log_probs(network, row, temperature=temperature)
        if row_loss is not None:
            auxiliary = auxiliary + row_loss(logits) / len(samples)
        assert row.weights is not None
        terms = algorithm.loss(log_probs, entropy, _row_as_batch(row))
        weighted = terms.loss * row.weights.double()
        total_loss, loss_size = total_loss + weighted.sum(), loss_size + float(weighted.detach().abs().sum())
        for name, value in terms.means.items():
            kinds = terms.kinds.get(name, frozenset(RowKind))
            if row.kind in kinds:
                count = sum(other.num_loss_tokens for other in samples if other.kind in kinds)
                shown = value.detach().double() if row.loss_mask is None else value.detach().double()[row.loss_mask]
                sums[name] = sums.get(name, 0.0) + float(shown.sum()) / count
    (total_loss + auxiliary).backward()
    held = {name: parameter.grad for name, parameter in network.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in held.values() if gradient is not None]).norm()
    gradients = checkpoint_views(held, network.config.model_type)
    return {
        "loss": float(total_loss.detach()),
        "loss_size": loss_size,
        "metrics": sums,
        "gradients": gradients,
        "grad_norm": float(norm),
    }


def sequence_balance(balance: float, z_loss: float, num_chosen: int) -> Callable[[list[Tensor]], Tensor]:
    """The auxiliary losses of ``model/experts.py`` as a ``row_loss``."""

    def of_row(logits: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for layer in logits:
            probs, (length, num_experts) = layer.softmax(-1), layer.shape
            counts = torch.bincount(probs.topk(num_chosen).indices.flatten(), minlength=num_experts)
            shares = num_experts / (num_chosen * length**2) * counts
            total = total + balance * (shares * probs.sum(0)).sum() + z_loss * layer.logsumexp(-1).square().mean()
        return total

    return of_row


def watch_routers(network: Any) -> list[Tensor]:
    """Return a list that will hold the routers' logits [L, E] of the last forward, by layer; empty in a dense model."""
    seen: list[Tensor] = []
    for layer in network.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(
                lambda gate, args, _out: seen.append(args[0].reshape(-1, args[0].shape[-1]) @ gate.weight.t())
            )
    return seen


def one_update(policy: Policy, algorithm: Algorithm, samples: Sequence[TrainingSample]) -> Outcome:
    """Loss, metrics, gradients (rank 0) and their norm of one update; the weights are gone after it.

    The optimizer does its whole step, for its norm is what a run reports and clips by. The policy is one that does not clip
    (``policy.optim.clip_grad`` 0): clipping would scale the gradients.
    """
    assert policy.trainable.optimizer.config.clip_grad == 0.0
    metrics = policy.train_step(samples, algorithm.loss)
    _make_whole(policy)
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    gradients = {n: g.clone() for n, g in iterate_hf_tensors(policy.chunks, policy.shape, policy.groups)}
    return {
        "loss": metrics["loss"],
        "metrics": metrics,
        "gradients": gradients if policy.groups.rank == 0 else {},
        "grad_norm": metrics["grad_norm"],
    }


def errors(found: Outcome, true: TrueOutcome) -> dict[str, float]:
    """Return the errors of the loss (over the size of its terms), of the worst metric (relative to it or to 1, whichever is
    more), of the worst parameter's gradient (norm of the difference over its own norm, or over 1e-3 of the whole gradient's if
    that is more), and of the norm that the optimizer reports (relative)."""
    of_metrics = [abs(found["metrics"][name] - value) / max(abs(value), 1.0) for name, value in true["metrics"].items()]
    return {
        "loss": _relative(found["loss"] - true["loss"], true["loss_size"]),
        "metric": _largest(of_metrics),
        "gradient": _largest(gradient_errors(found, true).values()),
        "grad_norm": _relative(found["grad_norm"] - true["grad_norm"], true["grad_norm"]),
    }


def gradient_errors(found: Outcome, true: TrueOutcome) -> dict[str, float]:
    """Return the gradient error of each parameter, as ``errors`` defines it."""
    norm = torch.stack([g.norm() for g in true["gradients"].values()]).norm()
    return {
        name: _relative(float((found["gradients"][name].double() - g).norm()), float(max(g.norm(), 1e-3 * norm)))
        for name, g in true["gradients"].items()
    }


def _relative(difference: float, size: float) -> float:
    """Return the difference over the size; of nothing that should be nothing, 0.0."""
    return _largest([abs(difference) / size]) if size else _largest([0.0 if difference == 0 else math.inf])


def _largest(values: Iterable[float]) -> float:
    """NaN is worse than any number; ``max`` would pass over it."""
    return max((value if math.isfinite(value) else math.inf for value in values), default=0.0)


def _row_as_batch(row: TrainingSample) -> MicroBatch:
    fields = ("advantages", "old_log_probs", "ref_log_probs")
    vectors = {name: torch.zeros(row.num_response_tokens, dtype=torch.float64) for name in fields}
    vectors |= {name: value.double() for name in fields if (value := getattr(row, name)) is not None}
    mask = torch.ones(row.num_response_tokens, dtype=torch.bool)
    none, length = torch.zeros(0), torch.tensor([row.num_tokens])
    sequence = torch.zeros(row.num_response_tokens, dtype=torch.int64)
    kind = torch.full((row.num_response_tokens,), int(row.kind))
    loss_mask = mask if row.loss_mask is None else row.loss_mask
    return MicroBatch(none, none, none, none, 0, mask, loss_mask, [0], none, sequence, length, kind, vectors)


def _make_whole(policy: Policy) -> None:
    """The distributed optimizer leaves each rank its shard of a gradient; collect the others'."""
    for model in policy.trainable.models:
        for group in [*model.bucket_groups, *model.expert_parallel_bucket_groups]:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shards = list(bucket.grad_data.chunk(ranks.size()))
                dist.all_gather(shards, shards[ranks.rank()].clone(), group=ranks)
