"""Mixtures of experts: any layout, one result; exports; what does not fit is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.doctor import exactness
from megatron_rl.doctor.exactness import load_reference, naive_log_probs, sequence_balance
from megatron_rl.errors import UserError
from tests.forked import run_ranks
from tests.parallel.invariance import (
    assert_exact,
    config_of,
    entropies,
    errors,
    num_ranks,
    outcomes,
    outside,
    recorded_batch,
    reference,
)
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
    ({"tp": 2, "sp": True}, WHOLE_EXPERTS),
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
    network, gaps = load_reference(model), []
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
    assert_exact(outcomes(model, batch, layout, overrides), true)


@pytest.mark.parametrize(("layout", "overrides"), LAYOUTS, ids=str)
def test_the_first_ratio_is_exact(model: Path, batch: list, layout: dict, overrides: tuple[str, ...]) -> None:
    run_ranks(entropies, num_ranks(layout), model, batch, layout, overrides)


# ------------------------------------------------------------------------------------------------ auxiliary losses

BALANCE = (
    "policy.megatron_cfg.moe_router_load_balancing_type=seq_aux_loss",
    "policy.megatron_cfg.moe_aux_loss_coeff=0.5",
    "policy.megatron_cfg.moe_z_loss_coeff=0.1",
)


@pytest.fixture(scope="module")
def balanced(model: Path, batch: list) -> dict:
    return reference(model, batch, row_loss=sequence_balance(0.5, 0.1, num_chosen=2))


PACKED = [(*case, 8192) for case in (LAYOUTS[0], LAYOUTS[2], LAYOUTS[4], *LAYOUTS[-3:])]
PACKED += [(*case, tokens) for case in (LAYOUTS[0], LAYOUTS[4]) for tokens in (150, 0)]
"""Layouts and budgets; 0: not packed."""


@pytest.mark.parametrize(("layout", "overrides", "tokens"), PACKED, ids=str)
def test_auxiliary_losses_do_not_depend_on_layout_or_packing(
    model: Path, batch: list, true: dict, balanced: dict, layout: dict, overrides: tuple[str, ...], tokens: int
) -> None:
    found = errors(outcomes(model, batch, layout, (*overrides, *BALANCE), tokens=tokens)[0], balanced)
    assert found["loss"] < 1e-6 and found["gradient"] < 1e-5 and found["grad_norm"] < 1e-5, found
    gate = next(name for name in true["gradients"] if "gate.weight" in name)
    of_both = balanced["gradients"][gate]
    assert (of_both - true["gradients"][gate]).norm() > 0.1 * of_both.norm(), "the case must be about these losses"


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_auxiliary_losses_when_layers_are_recomputed(model: Path, batch: list, balanced: dict, kind: str) -> None:
    recompute = [f"policy.megatron_cfg.recompute_granularity={kind}"]
    if kind == "full":
        recompute += ["policy.megatron_cfg.recompute_method=uniform", "policy.megatron_cfg.recompute_num_layers=1"]
    found = errors(outcomes(model, batch, {"pp": 2}, (*BALANCE, *recompute), tokens=150)[0], balanced)
    assert found["gradient"] < 1e-5 and found["grad_norm"] < 1e-5, found


def count_padding() -> None:
    from megatron_rl.model.experts import ExpertRouter

    def wrong(self, num_tokens: int):  # type: ignore[no-untyped-def]
        sequence = self._mine(self.pack.sequence, num_tokens).clamp(min=0)
        return sequence, torch.ones_like(sequence, dtype=torch.bool)

    ExpertRouter._sequences = wrong


def count_local_tokens() -> None:
    from megatron_rl.model import experts

    experts.dist = type("Alone", (), {"all_reduce": staticmethod(lambda *_args, **_kwargs: None)})


@pytest.mark.parametrize("mutate", [count_padding, count_local_tokens])
def test_an_error_in_the_counts_is_noticed(model: Path, batch: list, balanced: dict, mutate) -> None:  # type: ignore[no-untyped-def]
    found = errors(outcomes(model, batch, {"cp": 2}, BALANCE, mutate=mutate)[0], balanced)
    assert found["gradient"] > 1e-4, found


# ------------------------------------------------------------------------------------------------ the gradient's norm

SPREAD: tuple[dict, tuple[str, ...]] = ({"tp": 2, "sp": True}, (*EP2, *WHOLE_EXPERTS))


def count_experts(change: Callable[[list], list]) -> Callable[[], None]:
    """A mutation: the optimizer of the experts gives other gradients to the norm than its own."""

    def mutate() -> None:
        from megatron.core.optimizer.optimizer import MegatronOptimizer

        counted = MegatronOptimizer.get_main_grads_for_grad_norm

        def wrong(self) -> list:  # type: ignore[no-untyped-def]
            weights = [weight for group in self.model_fp32_groups for weight in group]
            return counted(self) if weights[0].allreduce else change(counted(self))

        MegatronOptimizer.get_main_grads_for_grad_norm = wrong

    return mutate


def on_one_rank(gradients: list) -> list:
    """What the norm of experts of Transformer Engine was in Megatron-Core before 0.19."""
    return gradients if torch.distributed.get_rank() == 0 else []


@pytest.mark.parametrize("change", [lambda gradients: gradients * 2, on_one_rank], ids=["twice", "on one rank"])
def test_experts_counted_wrongly_are_noticed(model: Path, batch: list, true: dict, change) -> None:  # type: ignore[no-untyped-def]
    found = outcomes(model, batch, *SPREAD, mutate=count_experts(change))[0]
    assert outside(found, true).keys() == {"grad_norm"}


def without_a_mark(model: Path, name: str, is_cut: bool) -> str:
    """The refusal of a policy of which a weight has the wrong mark."""
    from megatron_rl.model.policy import Policy

    trainable = build_policy(config_of(model, *SPREAD[1], **SPREAD[0])).trainable
    [weight] = [value for key, value in trainable.chunks[0].named_parameters() if key.endswith(name)]
    assert getattr(weight, "tensor_model_parallel", False) != is_cut
    weight.tensor_model_parallel = is_cut
    with pytest.raises(UserError) as caught:
        Policy(trainable)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "is_cut", "words"),
    [
        ("layers.1.mlp.experts.local_experts.1.linear_fc2.weight", False, "not wholly in the gradient norm"),
        ("layers.0.self_attention.linear_qkv.weight", False, "not wholly in the gradient norm"),
        ("layers.0.input_layernorm.weight", True, "more than once in the gradient norm"),
    ],
)
def test_a_weight_that_the_norm_would_count_wrongly_is_refused(
    model: Path, name: str, is_cut: bool, words: str
) -> None:
    [one, other] = run_ranks(without_a_mark, 2, model, name, is_cut)
    assert one == other and words in one


# ------------------------------------------------------------------------------------------------ routing replay


def force_routers(network: torch.nn.Module) -> list[torch.Tensor]:
    """A list of [L, k] choices, one a layer, that the routers of a transformers model will follow in their next forward."""
    choices: list[torch.Tensor] = []

    def follow(number: int, args: tuple, gate: torch.nn.Module) -> tuple:
        scores = (args[0].reshape(-1, args[0].shape[-1]) @ gate.weight.t()).softmax(-1)
        chosen = scores.gather(1, choices[number])
        return scores, chosen / chosen.sum(-1, keepdim=True), choices[number]

    for number, layer in enumerate(network.model.layers):
        layer.mlp.gate.register_forward_hook(lambda gate, args, _out, number=number: follow(number, args, gate))
    return choices


@pytest.mark.parametrize(
    ("layout", "overrides", "tokens"),
    [(*LAYOUTS[0], 8192), (*LAYOUTS[0], 150), (*LAYOUTS[1], 8192), (*LAYOUTS[4], 150), (*LAYOUTS[-1], 8192)],
    ids=str,
)
def test_recorded_choices_are_repeated(
    model: Path, batch: list, layout: dict, overrides: tuple[str, ...], tokens: int
) -> None:
    generator, samples = torch.Generator().manual_seed(8), copy.deepcopy(batch)
    shape = (2, 2)  # layers, experts chosen; a random choice is hardly ever the router's own
    told = [torch.rand(row.num_tokens, *shape[:1], 4, generator=generator).topk(2).indices for row in samples]
    network = load_reference(model)
    forced = force_routers(network)
    for row, choice in zip(samples, told):
        row.experts = choice[:-1].to(torch.int16)
        forced[:] = list(choice.unbind(1))
        noise = torch.randn(row.num_response_tokens, generator=generator) * 0.2
        row.old_log_probs = naive_log_probs(network, row)[0].detach().float() + noise
    network = load_reference(model)
    forced = force_routers(network)

    def follow(number: int) -> None:
        forced[:] = list(told[number].unbind(1))

    true = exactness.reference(network, GRPO(config_of(model)), samples, before_row=follow)
    assert_exact(outcomes(model, samples, layout, overrides, tokens=tokens), true)
    samples[1].experts = None  # its routers choose themselves: not what was recorded
    assert errors(outcomes(model, samples, {"tp": 1})[0], true)["gradient"] > 1e-3


def swap_two_experts() -> None:
    from megatron_rl.model import weights

    name = weights.global_name
    weights.global_name = lambda *where: name(*where).replace(
        "local_experts.0.linear_fc2", "local_experts.1.linear_fc2"
    )


def test_a_confusion_of_experts_is_noticed(model: Path, batch: list, true: dict) -> None:
    result = outcomes(model, batch, {"dp": 2}, EP2, mutate=swap_two_experts)[0]
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
