"""Floating-point operations, against torch's own count of a real forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.model.flops import efficiency, forward_flops, peak_flops
from tests.tiny_models import make_tiny_model

LENGTH = 96


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("qwen2", True), ("qwen3", False), ("qwen3_moe", False), ("deepseek_v3", False)],
)
def test_products_are_those_of_a_forward_pass(family: str, tied: bool, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, family, tied=tied, seed=1)  # type: ignore[arg-type]
    shape = read_shape(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(3, 131, (1, LENGTH)))
    square = (forward_flops(shape, [(2, 0)]) - 2 * forward_flops(shape, [(1, 0)])) / 2
    ours = forward_flops(shape, [(LENGTH, LENGTH)]) + LENGTH**2 * square  # eager attention computes the upper half, too
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_output_layer_sees_labels_alone(tmp_path: Path) -> None:
    shape = read_shape(make_tiny_model(tmp_path, "qwen2", tied=True, seed=1))
    all_of_them, none = forward_flops(shape, [(10, 10)]), forward_flops(shape, [(10, 0)])
    assert all_of_them - none == 2 * 10 * shape.vocab_size * shape.hidden_size


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12), ("NVIDIA GeForce RTX 3090", None), ("", None),
    ],
)  # fmt: skip
def test_peaks_go_by_the_name_of_the_gpu(name: str, peak: float | None, tmp_path: Path) -> None:
    assert peak_flops(name) == peak
    shape = read_shape(make_tiny_model(tmp_path, "qwen2", tied=True, seed=1))
    rows = [(10, 4), (20, 8)]
    found = efficiency(shape, rows, num_passes=2, seconds=0.5, num_devices=4, name=name)
    assert found["update/flops_per_s_per_device"] == 3 * 2 * forward_flops(shape, rows) / 0.5 / 4
    assert found.get("update/mfu") == (found["update/flops_per_s_per_device"] / peak if peak else None)
