"""Mixtures of experts: any layout, one result; exports; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.forked import run_ranks
from tests.parallel.invariance import entropies, errors, load, num_ranks, one_update, recorded_batch, reference
from tests.policy_case import build_policy, tiny_config
from tests.tiny_models import make_tiny_model

EP2 = ("policy.megatron_cfg.expert_model_parallel_size=2",)
EP4 = ("policy.megatron_cfg.expert_model_parallel_size=4",)
WHOLE_EXPERTS = ("policy.megatron_cfg.expert_tensor_parallel_size=1",)
LAYOUTS: list[tuple[dict, tuple[str, ...]]] = [
    ({"tp": 1}, ()),
    ({"dp": 2}, EP2),
    ({"dp": 4}, EP4),
    ({"dp": 4}, EP2),
    ({"cp": 2}, EP2),
    ({"pp": 2}, ()),
    ({"pp": 2, "dp": 2}, EP2),
    ({"tp": 2, "sp": True}, ()),
    ({"tp": 2, "sp": True}, (*EP2, *WHOLE_EXPERTS)),
    ({"tp": 2, "sp": True, "dp": 2}, EP2),
    ({"tp": 2, "sp": True, "cp": 2, "pp": 2}, EP2),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("experts"), "qwen3_moe", tied=False, seed=5, num_hidden_layers=2)


@pytest.fixture(scope="module")
def batch(model: Path) -> list:
    samples = recorded_batch(model)
    # A token whose second and third choice were closer than rounding would go elsewhere under another layout.
    network, gaps = load(model), []
    for layer in network.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _gate, args, _out, weight=layer.mlp.gate.weight: gaps.append(args[0] @ weight.t())
        )
    for row in samples:
        network(torch.cat([row.prompt_ids, row.response_ids])[None])
    top = torch.cat([logits.reshape(-1, logits.shape[-1]) for logits in gaps]).topk(3).values
    assert (top[:, 1] - top[:, 2]).min() > 1e-4
    return samples


@pytest.fixture(scope="module")
def true(model: Path, batch: list) -> dict:
    return reference(model, batch)


@pytest.mark.parametrize(("layout", "overrides"), LAYOUTS, ids=str)
def test_every_gradient_under_every_layout(
    model: Path, batch: list, true: dict, layout: dict, overrides: tuple[str, ...]
) -> None:
    assert any(".experts.3." in name for name in true["gradients"]) and any(
        "gate.weight" in n for n in true["gradients"]
    )
    found = errors(run_ranks(one_update, num_ranks(layout), model, batch, layout, overrides)[0], true)
    assert found["loss"] < 1e-6 and found["metric"] < 1e-5 and found["gradient"] < 1e-5, found


@pytest.mark.parametrize(("layout", "overrides"), [LAYOUTS[0], LAYOUTS[1], LAYOUTS[-1]], ids=str)
def test_the_first_ratio_is_exact(model: Path, batch: list, layout: dict, overrides: tuple[str, ...]) -> None:
    run_ranks(entropies, num_ranks(layout), model, batch, layout, overrides)


def swap_two_experts() -> None:
    from megatron_rl.model import weights

    name = weights.global_name
    weights.global_name = lambda *where: name(*where).replace(
        "local_experts.0.linear_fc2", "local_experts.1.linear_fc2"
    )


def test_a_confusion_of_experts_is_noticed(model: Path, batch: list, true: dict) -> None:
    result = run_ranks(one_update, 2, model, batch, {"dp": 2}, EP2, swap_two_experts)[0]
    assert abs(result["loss"] - true["loss"]) > 1e-3 * abs(true["loss"])


def export(model: Path, layout: dict, overrides: tuple[str, ...], target: Path) -> None:
    from megatron_rl.model.weights import export_hf

    policy = build_policy(tiny_config(model, *overrides, **layout))
    export_hf(policy.chunks, policy.shape, policy.groups, source=model, target=target)


@pytest.mark.parametrize(("layout", "overrides"), [LAYOUTS[0], LAYOUTS[1], LAYOUTS[-3], LAYOUTS[-1]], ids=str)
def test_export_is_bit_exact(model: Path, layout: dict, overrides: tuple[str, ...], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run_ranks(export, num_ranks(layout), model, layout, overrides, tmp_path / "hf")
    source, written = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "hf"))
    assert source.keys() == written.keys()
    assert all(torch.equal(source[name], written[name]) for name in source)
