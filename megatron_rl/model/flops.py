"""Floating-point operations of a model, and what a GPU can do at most: both sides of model FLOPs utilisation (MFU)."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.table import hf_tensors

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "H20": 148e12,
    "L40S": 362e12,
}
"""Operations per second of dense bfloat16 products with float32 sums, from the vendor's data sheets."""
PASSES = 3
"""Passes of a training step in units of a forward pass: the backward pass makes two products for each of the forward pass."""


def forward_flops(shape: ModelShape, rows: Iterable[tuple[int, int]]) -> float:
    """Return the floating-point operations of one forward pass over some rows.

    Counted are products, two operations for each multiplication: linear layers, of experts those that a token is sent to, the
    output layer, and causal attention, half of the square. Recomputation is no work of the model and does not count
    (arXiv 2205.05198, equation 2, for any feed-forward width and grouped keys).

    Args:
        shape: of the model.
        rows: (tokens, tokens that have a log-prob) of each; the output layer sees only the latter.
    """
    tokens = labels = squares = 0
    for length, num_labels in rows:
        tokens, labels, squares = tokens + length, labels + num_labels, squares + length * length
    attended = shape.num_attention_heads * _head_products(shape) * shape.num_layers
    output = shape.vocab_size * shape.hidden_size
    return 2.0 * (tokens * _active_parameters(shape) + labels * output) + squares * attended


def efficiency(
    shape: ModelShape,
    rows: Iterable[tuple[int, int]],
    *,
    num_passes: int,
    seconds: float,
    num_devices: int,
    name: str = "",
) -> dict[str, float]:
    """Return what the updates of a step made of the devices.

    Args:
        shape: of the model.
        rows: of the step, as ``forward_flops`` takes them.
        num_passes: passes over them.
        seconds: of forward, backward and optimizer.
        num_devices: of the trainer.
        name: of one in CUDA.

    Returns:
        ``update/flops_per_s_per_device``, and ``update/mfu``, its share of the peak of a GPU that is known.
    """
    if seconds <= 0:
        return {}
    speed = PASSES * num_passes * forward_flops(shape, rows) / seconds / num_devices
    peak = peak_flops(name)
    return {"update/flops_per_s_per_device": speed} | ({"update/mfu": speed / peak} if peak else {})


def peak_flops(device_name: str) -> float | None:
    """Return the most bfloat16 operations per second of a GPU, by its name in CUDA; None if it is not known here."""
    known = [name for name in PEAKS if set(name.split()) <= set(device_name.replace("-", " ").split())]
    return PEAKS[max(known, key=len)] if known else None


def _active_parameters(shape: ModelShape) -> float:
    """Return the weights of linear layers that each token meets, without the output layer."""
    used = shape.num_experts_per_tok / shape.num_experts if shape.num_experts else 1.0
    total = 0.0
    for name, extent in hf_tensors(shape).items():
        if len(extent) == 2 and name not in ("model.embed_tokens.weight", "lm_head.weight"):
            total += prod(extent) * (used if ".experts." in name else 1.0)
    return total


def _head_products(shape: ModelShape) -> int:
    """Return the sizes of a head's query and of its value: twice their products, over half of the square."""
    if shape.latent is not None:
        return shape.latent.qk_nope_head_dim + shape.latent.qk_rope_head_dim + shape.latent.v_head_dim
    return 2 * shape.head_dim
