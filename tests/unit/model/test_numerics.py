"""The monitor finds what was planted, in the layer where it was planted, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.config import NumericsConfig
from megatron_rl.model.numerics import NumericsMonitor, _range, summary
from megatron_rl.model.policy import Policy
from tests.forked import run_ranks
from tests.parallel.invariance import config_of, num_ranks, recorded_batch
from tests.policy_case import build_policy
from tests.tiny_models import make_tiny_model

FP8 = ("policy.megatron_cfg.fp8=hybrid", "policy.megatron_cfg.fp8_recipe=tensorwise")
LAYERS = {
    f"layers.{layer}.{name}"
    for layer in range(4)
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tied=False, seed=3, num_hidden_layers=4)


@pytest.fixture(scope="module")
def samples(model: Path) -> list:
    return recorded_batch(model)


def weight_of(policy: Policy, name: str) -> Any:
    _, layer, *rest = name.split(".")
    here = next(x for chunk in policy.chunks for x in chunk.decoder.layers if x.layer_number == int(layer) + 1)
    return here.get_submodule(".".join(rest)).weight.data


def watched(
    model: Path,
    samples: list,
    layout: dict,
    overrides: tuple[str, ...] = (),
    plant: Callable[[Policy], None] | None = None,
    limits: dict[str, float] | None = None,
) -> tuple[dict, list[str], dict]:
    from megatron_rl.algorithms.grpo import GRPO

    config = config_of(model, *overrides, **layout)
    policy = build_policy(config)
    if plant is not None:
        plant(policy)
    monitor = NumericsMonitor(
        policy.chunks, NumericsConfig(**(limits or {})), config.policy.megatron_cfg, policy.groups
    )
    assert monitor.report() == {}
    monitor.watch()
    metrics = policy.train_step(samples, GRPO(config).loss)
    report = monitor.report()
    assert monitor.report() == {}
    return report, monitor.alarms(report), metrics


def run(model: Path, samples: list, layout: dict, *more: Any) -> tuple[dict, list[str], dict]:
    return run_ranks(watched, num_ranks(layout), model, samples, layout, *more)[0]


def test_every_layer_is_looked_at_and_nothing_changes(model: Path, samples: list) -> None:
    report, alarms, metrics = run(model, samples, {}, FP8)
    assert set(report) == LAYERS and not alarms

    def unwatched() -> dict:
        from megatron_rl.algorithms.grpo import GRPO

        config = config_of(model, *FP8)
        return build_policy(config).train_step(samples, GRPO(config).loss)

    assert run_ranks(unwatched, 1)[0] == metrics
    for values in report.values():
        assert 0.01 < values["output_error"] < 0.1
        assert all(values[f"{role}_amax"] > 0 for role in ("input", "weight", "gradient"))
    assert summary(report)["numerics/output_error_max"] == max(values["output_error"] for values in report.values())


@pytest.mark.parametrize("layout", [{"tp": 2, "sp": True}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"dp": 2}], ids=str)
def test_layers_have_their_place_in_the_whole_model(layout: dict, model: Path, samples: list) -> None:
    """Of weights the report is exact: every rank sees its part."""
    found, _, _ = run(model, samples, layout, FP8)
    one, _, _ = run(model, samples, {}, FP8)
    assert set(found) == LAYERS
    assert {name: v["weight_amax"] for name, v in found.items()} == {name: v["weight_amax"] for name, v in one.items()}
    assert all(values["gradient_amax"] > 0 for values in found.values())


def test_gradients_are_seen_through_recomputation(model: Path, samples: list) -> None:
    again = ("policy.megatron_cfg.recompute_granularity=full", "policy.megatron_cfg.recompute_method=uniform")
    report, _, _ = run(model, samples, {}, (*FP8, *again, "policy.megatron_cfg.recompute_num_layers=1"))
    assert report == run(model, samples, {}, FP8)[0]


def test_what_is_planted_is_named(model: Path, samples: list) -> None:
    name = "layers.2.mlp.linear_fc2"

    def spread(policy: Policy) -> None:  # one number so large that a scale for the tensor loses most of the others
        weight_of(policy, name)[0, 0] = 1e6

    report, alarms, _ = run(model, samples, {}, FP8, spread)
    assert report[name]["weight_amax"] == 1e6 and report[name]["weight_underflow"] > 0.5
    assert any(line.startswith("weight_underflow") and name in line and "0 other layers" in line for line in alarms), (
        alarms
    )
    blocks = ("policy.megatron_cfg.fp8=hybrid", "policy.megatron_cfg.fp8_recipe=mxfp8")
    confined = run(model, samples, {}, blocks, spread)[0][name]
    assert confined["weight_underflow"] < 0.1 * report[name]["weight_underflow"], "small blocks confine it"


def test_layers_that_fp8_leaves_out_are_not_looked_at(model: Path, samples: list) -> None:
    report, _, _ = run(model, samples, {}, (*FP8, "policy.megatron_cfg.first_last_layers_bf16=true"))
    assert set(report) == {name for name in LAYERS if name.split(".")[1] in "12"}


def test_experts_are_named_over_the_whole_model(tmp_path: Path) -> None:
    """Also where some get no token."""
    model = make_tiny_model(tmp_path, "qwen3_moe", tied=False, seed=3)
    few = recorded_batch(model)[:2]
    layout = {"dp": 2}
    overrides = (*FP8, "policy.megatron_cfg.expert_model_parallel_size=2", "policy.train_global_batch_size=2")
    report, _, _ = run(model, few, layout, overrides)
    experts = {int(name.split("local_experts.")[1].split(".")[0]) for name in report if "local_experts" in name}
    assert experts == set(range(4))


def test_delayed_scales_that_are_too_large_overflow(model: Path, samples: list) -> None:
    name = "layers.1.self_attention.linear_qkv"

    def old_scale(policy: Policy) -> None:
        layer = policy.chunks[0].decoder.layers[1].self_attention.linear_qkv
        layer.quantizers.scale[0] = 1e4

    report, alarms, _ = run(model, samples, {}, ("policy.megatron_cfg.fp8=hybrid",), old_scale)
    assert report[name]["input_overflow"] > 0.5
    assert any(line.startswith("input_overflow") and name in line for line in alarms)


def test_scales_that_transformer_engine_holds_are_used() -> None:
    """Its layers keep them in ``fp8_meta``, where a pass in eight bits has been; until then the tensor at hand decides."""
    monitor = NumericsMonitor([], NumericsConfig(), {"fp8": "hybrid"}, SimpleNamespace(ep_rank=0))
    x = torch.full((4, 8), 10.0)
    assert _range(monitor._quantizers(SimpleNamespace(fp8_meta={})), "input", x)["input_overflow"] == 0.0
    scales = {"scaling_fwd": torch.tensor([100.0, 1.0, 1.0]), "scaling_bwd": torch.tensor([1e4, 1.0])}
    layer = SimpleNamespace(fp8_meta={key: SimpleNamespace(scale=scale) for key, scale in scales.items()})
    found = {role: _range(monitor._quantizers(layer), role, x) for role in ("input", "weight", "gradient")}
    assert [found[role][f"{role}_overflow"] for role in found] == [1.0, 0.0, 1.0]


def test_without_fp8_it_tells_what_fp8_would_do(model: Path, samples: list) -> None:
    report, _, metrics = run(model, samples, {}, (), None, {"forecast": "tensorwise"})
    fp8, _, other = run(model, samples, {}, FP8)
    assert metrics["loss"] != other["loss"]
    first = "layers.0.self_attention.linear_qkv"  # whose input no eight bits have touched yet
    # Padding apart: packs of eight bits have a multiple of 16 tokens.
    assert report[first]["output_error"] == pytest.approx(fp8[first]["output_error"], rel=0.02)


def test_alarms_are_about_limits_and_what_is_not_finite() -> None:
    monitor = NumericsMonitor((), NumericsConfig(max_output_error=0.5), {}, groups=None)  # type: ignore[arg-type]
    fine, bad = {"output_error": 0.4, "input_amax": 3.0}, {"output_error": 0.6, "input_amax": math.nan}
    assert monitor.alarms({"a": fine}) == []
    amax, error = monitor.alarms({"a": fine, "b": bad})
    assert amax == "input_amax nan in b and 0 other layers; every number should be finite"
    assert error == "output_error 0.6 in b and 0 other layers; trainer.numerics.max_output_error = 0.5"
    assert math.isnan(summary({"a": fine, "b": bad})["numerics/input_amax_max"])


def test_torch_rounds_as_the_monitor_says() -> None:
    """A share counted by hand: three of eight numbers are below half of the smallest that e4m3 holds at this scale."""
    from megatron_rl.model.fp8.emulation import Quantizers
    from megatron_rl.model.fp8.recipe import recipe_of
    from megatron_rl.model.numerics import _range

    recipe = recipe_of({"fp8": "e4m3", "fp8_recipe": "tensorwise"})
    assert recipe is not None
    x = torch.tensor([[448.0, 1.0, 2.0**-9, 2.0**-10 * 1.01, 2.0**-10, 2.0**-12, -(2.0**-11), 0.0]])
    assert _range(Quantizers(recipe), "input", x) == {
        "input_amax": 448.0,
        "input_underflow": 3 / 8,
        "input_overflow": 0.0,
    }
