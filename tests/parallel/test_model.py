"""What surrounds the invariance suite: log-probs of transformers, exports, recompute, bfloat16, the schedule."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.forked import run_ranks
from tests.policy_case import build_policy, log_probs_of, random_samples, tiny_config
from tests.tiny_models import make_tiny_model


def num_ranks(layout: dict) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    root = tmp_path_factory.mktemp("models")
    llama3 = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    return {
        (family, tied): make_tiny_model(
            root / f"{family}-{tied}", family, tied=tied, seed=5, num_hidden_layers=4,
            **({"rope_parameters": llama3} if family == "llama" else {}),
        )
        for family in ("llama", "qwen2", "qwen3")
        for tied in (True, False)
    }  # fmt: skip


def one_update(model: Path, layout: dict, overrides: tuple[str, ...] = ()) -> dict:
    """Log-probs of all rows, and what the first update reports."""
    from megatron_rl.algorithms.grpo import GRPO

    config = tiny_config(model, *overrides, **layout)
    policy, algorithm, samples = build_policy(config), GRPO(config), random_samples()
    policy.fill_log_probs(samples, [range(len(samples))], "old_log_probs")
    policy.fill_log_probs(samples, [range(len(samples))], "ref_log_probs")
    before = [row.old_log_probs for row in samples]
    for row in samples:  # a reference that differs, so that the KL term has a gradient
        row.ref_log_probs = row.ref_log_probs - 0.3
    return {"log_probs": before, **policy.train_step(samples, algorithm.loss)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 2, "pp": 2, "sp": True}], ids=str)
def test_log_probs_are_those_of_transformers(models: dict, family: str, tied: bool, layout: dict) -> None:
    model = models[family, tied]
    expected = log_probs_of(AutoModelForCausalLM.from_pretrained(model), random_samples())
    world_size = num_ranks(layout)
    for result in run_ranks(one_update, world_size, model, layout):
        for mine, true in zip(result["log_probs"], expected):
            assert (mine - true).abs().max() < 1e-4


@pytest.fixture(scope="session")
def single(models: dict) -> dict:
    return {case: run_ranks(one_update, 1, models[case], {"tp": 1})[0] for case in (("qwen3", True), ("llama", False))}


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_does_not_change_the_update(models: dict, single: dict, recompute: str) -> None:
    overrides = [f"policy.megatron_cfg.recompute_granularity={recompute}"]
    if recompute == "full":
        overrides += ["policy.megatron_cfg.recompute_method=uniform", "policy.megatron_cfg.recompute_num_layers=1"]
    result = run_ranks(one_update, 1, models["qwen3", True], {"tp": 1}, tuple(overrides))[0]
    assert result["loss"] == pytest.approx(single["qwen3", True]["loss"], rel=1e-6)
    assert result["grad_norm"] == pytest.approx(single["qwen3", True]["grad_norm"], rel=1e-5)
    assert result["ratio/max_abs_log_ratio"] == 0.0


def update_with_swapped_norms(model: Path) -> dict:
    from megatron_rl.convert.tables import table

    rules = []
    for rule in table.TABLES["qwen3"]:
        names = {"q_layernorm": "k_layernorm", "k_layernorm": "q_layernorm"}
        for old, new in names.items():
            if f".{old}." in rule.megatron:
                rule = type(rule)(rule.megatron.replace(old, new), rule.hf, rule.kind, rule.needs, rule.is_copy)
                break
        rules.append(rule)
    table.TABLES["qwen3"] = tuple(rules)
    return one_update(model, {"tp": 1})


def test_a_swapped_query_and_key_norm_is_noticed(models: dict) -> None:
    model = models["qwen3", False]
    expected = log_probs_of(AutoModelForCausalLM.from_pretrained(model), random_samples())
    result = run_ranks(update_with_swapped_norms, 1, model)[0]
    assert max((mine - true).abs().max() for mine, true in zip(result["log_probs"], expected)) > 0.01


def export(model: Path, layout: dict, target: Path) -> None:
    from megatron_rl.model.weights import export_hf

    policy = build_policy(tiny_config(model, **layout))
    export_hf(policy.chunks, policy.shape, policy.groups, source=model, target=target)


@pytest.mark.parametrize(
    "layout",
    [{"tp": 1}, {"tp": 2, "sp": True}, {"pp": 2}, {"tp": 2, "pp": 2, "dp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}],
    ids=str,
)
@pytest.mark.parametrize("case", [("qwen3", True), ("qwen2", False), ("llama", True)], ids=str)
def test_export_is_bit_exact(models: dict, layout: dict, case: tuple, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    world_size = num_ranks(layout)
    run_ranks(export, world_size, models[case], layout, tmp_path / "hf")
    source, written = (load_file(d / "model.safetensors") for d in (models[case], tmp_path / "hf"))
    assert source.keys() == written.keys()
    assert all(torch.equal(source[name], written[name]) for name in source)


def bf16_update(model: Path, layout: dict) -> dict:
    return one_update(model, layout, ("trainer.precision=bf16",))


def test_bf16_runs_and_stays_near_float32(models: dict, single: dict) -> None:
    for layout in ({"tp": 1}, {"tp": 2, "sp": True}):
        result = run_ranks(bf16_update, layout["tp"], models["qwen3", True], layout)[0]
        assert result["grad_norm"] == pytest.approx(single["qwen3", True]["grad_norm"], rel=0.1)
        assert result["ratio/max_abs_log_ratio"] == 0.0


def learning_rates(model: Path) -> list[float]:
    from megatron_rl.algorithms.grpo import GRPO

    config = tiny_config(model, "policy.optim.sched={name: linear, warmup_updates: 2, decay_updates: 4}")
    policy, algorithm, samples = build_policy(config), GRPO(config), random_samples()
    policy.fill_log_probs(samples, [range(len(samples))], "old_log_probs")
    policy.fill_log_probs(samples, [range(len(samples))], "ref_log_probs")
    return [policy.train_step(samples, algorithm.loss)["lr"] for _ in range(5)]


def test_the_first_update_of_a_warm_up_is_not_wasted(models: dict) -> None:
    rates = run_ranks(learning_rates, 1, models["qwen3", True])[0]
    assert rates == pytest.approx([0.0005, 0.001, 0.0005, 0.0, 0.0])
