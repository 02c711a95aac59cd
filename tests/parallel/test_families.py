"""Mixtral and DeepSeek-V3 against transformers, under every kind of layout: logits, log-probs, gradients, exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.algorithms.grpo import GRPO
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.convert.hf.in_memory import checkpoint_views
from megatron_rl.convert.hf.load import check_coverage
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.doctor import exactness
from megatron_rl.doctor.exactness import LENGTHS, errors, load_reference, naive_log_probs
from megatron_rl.doctor.small_model import write_small_model
from megatron_rl.errors import UserError
from megatron_rl.types import RowKind, TrainingSample
from tests.forked import run_ranks
from tests.parallel.invariance import config_of, num_ranks
from tests.policy_case import build_policy
from tests.tiny_models import make_tiny_model

PLAIN = {
    "q_lora_rank": None, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "n_routed_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
MODELS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "mixtral": ("mixtral", False, {}),
    "mixtral-tied": ("mixtral", True, {}),
    "deepseek": ("deepseek_v3", False, {"num_hidden_layers": 4}),
    "deepseek-plain-tied": ("deepseek_v3", True, PLAIN),
}
MEMBERS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama-attention-bias": ("llama", False, {"attention_bias": True}),
    "llama-mlp-bias": ("llama", True, {"mlp_bias": True}),
    "qwen3-attention-bias": ("qwen3", True, {"attention_bias": True}),
    "qwen3-moe-attention-bias": ("qwen3_moe", False, {"attention_bias": True}),
    "mistral": ("mistral", False, {"sliding_window": None, "head_dim": 16}),
    # Far apart, so that an epsilon in the wrong place shows: norms over latents have 1e-6.
    "moonlight": (
        "deepseek_v3",
        False,
        PLAIN | {"first_k_dense_replace": 1, "num_hidden_layers": 4, "rms_norm_eps": 0.05},
    ),
}
"""Members of a family that have something of their own; one layout is enough for them."""
EP2 = ("policy.megatron_cfg.expert_model_parallel_size=2",)
ONE: tuple[dict, tuple[str, ...]] = ({"tp": 1}, ())
LAYOUTS: list[tuple[dict, tuple[str, ...]]] = [
    ONE,
    ({"tp": 2, "sp": True}, ()),
    ({"pp": 2}, ()),
    ({"dp": 2}, EP2),
]
CONTEXT: tuple[dict, tuple[str, ...]] = ({"cp": 2}, ())
SEVERAL = ({"tp": 2, "sp": True, "pp": 2}, (*EP2, "policy.megatron_cfg.expert_tensor_parallel_size=1"))
CASES = [(name, *layout) for name in MODELS for layout in LAYOUTS]
CASES += [(name, {"tp": 2, "sp": True, "pp": 2}, ()) for name in MEMBERS]
CASES += [("mixtral", *CONTEXT), ("deepseek", *CONTEXT), ("deepseek", *SEVERAL)]


@dataclass
class Case:
    """A model, rows to train on, and what transformers makes of them in float64."""

    model: Path
    samples: list[TrainingSample]
    logits: dict[tuple[int, int], Tensor]
    """(row, position) -> [V] where a response token is predicted."""
    update: exactness.TrueOutcome


class Cases(dict[str, Case]):
    """Made when they are asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, name: str) -> Case:
        self[name] = make_case(self._root / name, *(MODELS | MEMBERS)[name])
        return self[name]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("families"))


def make_case(directory: Path, family: str, tied: bool, overrides: dict[str, Any]) -> Case:
    model = make_tiny_model(directory, family, tied=tied, seed=5, **overrides)  # type: ignore[arg-type]
    network = load_reference(model)
    samples = rows_that_name_themselves(network)
    check_choices_are_clear(network, samples)
    logits = {}
    for number, row in enumerate(samples):
        with torch.no_grad():
            of_row = network(torch.cat([row.prompt_ids, row.response_ids])[None]).logits[0]
        first = len(row.prompt_ids) - 1
        logits |= {(number, first + place): of_row[first + place] for place in range(row.num_response_tokens)}
    update = exactness.reference(network, GRPO(config_of(model)), samples)
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return Case(model, samples, logits, {**update, "gradients": checkpoint_views(gradients, read_shape(model).family)})


def rows_that_name_themselves(network: Any) -> list[TrainingSample]:
    """Row r has ids that are r modulo the number of rows, so that any token tells where it belongs."""
    generator, samples = torch.Generator().manual_seed(3), []
    for number, (prompt, response) in enumerate(LENGTHS):
        ids = torch.randint(0, 131 // len(LENGTHS), (prompt + response,), generator=generator) * len(LENGTHS) + number
        row = TrainingSample(ids[:prompt], ids[prompt:], RowKind.RL)
        row.advantages = torch.randn(1, generator=generator).expand(response).clone()
        row.weights = torch.full((response,), 1 / sum(length for _, length in LENGTHS))
        with torch.no_grad():
            log_probs = naive_log_probs(network, row)[0].float()
        row.old_log_probs = log_probs + 0.2 * torch.randn(response, generator=generator)
        row.ref_log_probs = log_probs + 0.2 * torch.randn(response, generator=generator)
        samples.append(row)
    return samples


def check_choices_are_clear(network: Any, samples: list[TrainingSample]) -> None:
    """A change of the size of rounding sends no token to other experts: else layouts could differ and all be right."""
    moved: list[bool] = []

    def compare(gate: Any, args: tuple, output: tuple) -> None:
        noise = 1 + 1e-5 * torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0))
        again = gate.forward(args[0] * noise)
        moved.append(not torch.equal(again[2].sort().values, output[2].sort().values))

    hooks = [m.mlp.gate.register_forward_hook(compare) for m in network.model.layers if hasattr(m.mlp, "gate")]
    with torch.no_grad():
        for row in samples:
            network(torch.cat([row.prompt_ids, row.response_ids])[None])
    for hook in hooks:
        hook.remove()
    assert not any(moved) and bool(moved) == hasattr(network.model.layers[-1].mlp, "gate")


@dataclass
class Found:
    """What one rank has to say."""

    logits: dict[tuple[int, int], Tensor]
    log_probs: list[Tensor]
    update: exactness.Outcome


def run_everything(
    case: Case, layout: dict, overrides: tuple[str, ...] = (), target: Path | None = None,
    mutate: Callable[[], None] | None = None,
) -> Found:  # fmt: skip
    """On one rank: an export, log-probs of all rows, and an update."""
    from megatron_rl.model.weights import export_hf

    if mutate is not None:
        mutate()
    config = config_of(case.model, *overrides, **layout)
    policy = build_policy(config)
    if target is not None:
        export_hf(policy.chunks, policy.shape, policy.groups, source=case.model, target=target)
    logits = watch_logits()
    fresh = [replace(row, old_log_probs=None) for row in case.samples]
    policy.fill_log_probs(fresh, [range(len(fresh))], "old_log_probs")
    seen = dict(logits)
    log_probs = [row.old_log_probs for row in fresh if row.old_log_probs is not None]
    return Found(seen, log_probs, exactness.one_update(policy, GRPO(config), case.samples))


def watch_logits() -> dict[tuple[int, int], Tensor]:
    """Where the logits of response tokens will be, from the hidden states and weights that log-probs are made of."""
    from megatron_rl.model import forward

    seen: dict[tuple[int, int], Tensor] = {}
    postprocess, statistics = forward.PolicyModel._postprocess, forward.vocab_parallel_statistics
    positions: list[Tensor] = []

    def remember(self: Any, **named: Any) -> Any:
        if self.post_process:
            positions[:] = [named["position_ids"][0][named["loss_mask"][0]]]
        return postprocess(self, **named)

    def record(
        hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, tp_group: Any, **options: Any
    ) -> Any:
        mine = (hidden @ weight.t()).detach()
        parts = [torch.empty_like(mine) for _ in range(tp_group.size())]
        dist.all_gather(parts, mine, group=tp_group)
        for label, position, values in zip(labels, positions[0], torch.cat(parts, -1)[:, :vocab_size], strict=True):
            seen[int(label) % len(LENGTHS), int(position)] = values.clone()
        return statistics(hidden, weight, labels, vocab_size=vocab_size, tp_group=tp_group, **options)

    forward.PolicyModel._postprocess = remember  # type: ignore[method-assign]
    forward.vocab_parallel_statistics = record
    return seen


def largest_difference(case: Case, found: list[Found]) -> float:
    """Of any logit of any rank to its true value."""
    logits = {key: values for of_rank in found for key, values in of_rank.logits.items()}
    assert logits.keys() == case.logits.keys()
    return max(float((logits[key] - true).abs().max()) for key, true in case.logits.items())


@pytest.mark.parametrize(("name", "layout", "overrides"), CASES, ids=str)
def test_a_layout_computes_and_exports_what_transformers_does(
    cases: dict[str, Case], name: str, layout: dict, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    case = cases[name]
    found = run_ranks(run_everything, num_ranks(layout), case, layout, overrides, tmp_path / "hf")

    assert torch.stack(list(case.logits.values())).std() > 1
    assert largest_difference(case, found) < 1e-4
    for number, (row, mine) in enumerate(zip(case.samples, found[0].log_probs, strict=True)):
        first = len(row.prompt_ids) - 1
        for place, log_prob in enumerate(mine):
            true = case.logits[number, first + place].log_softmax(-1)[row.response_ids[place]]
            assert abs(log_prob - true) < 1e-4

    off = errors(found[0].update, case.update)
    assert off["loss"] < 3e-6 and off["metric"] < 1e-5 and off["gradient"] < 2e-5 and off["grad_norm"] < 1e-5, off

    source, written = (load_file(folder / "model.safetensors") for folder in (case.model, tmp_path / "hf"))
    assert source.keys() == written.keys()
    assert all(torch.equal(source[key], written[key]) for key in source)


def swap_in_table(family: str, one: str, other: str, *, order: tuple[int, ...] | None = None) -> None:
    """Two Megatron parameters get each other's tensors, or one (``other`` is empty) its own in another order."""
    from megatron_rl.convert.tables import table

    rules = list(table.TABLES[family])
    places = [
        next(i for i, rule in enumerate(rules) if end and rule.megatron.endswith(end)) for end in (one, other or one)
    ]
    first, second = (rules[place] for place in places)
    rules[places[0]] = replace(first, hf=second.hf if order is None else tuple(first.hf[i] for i in order))
    if order is None:
        rules[places[1]] = replace(second, hf=first.hf)
    table.TABLES[family] = tuple(rules)


def forget_the_bias() -> None:
    from megatron_rl.model import weights

    weights.chain = lambda parameters, _buffers: parameters


MUTATIONS = {
    "mixtral keys and values": ("mixtral", lambda: swap_in_table("mixtral", "linear_qkv.weight", "", order=(0, 2, 1))),
    "mixtral gate and up": ("mixtral", lambda: swap_in_table("mixtral", "linear_fc1.weight", "", order=(1, 0))),
    "deepseek norms": ("deepseek", lambda: swap_in_table("deepseek_v3", ".input_layernorm.weight", "pre_mlp_layernorm.weight")),
    "deepseek bias": ("deepseek", forget_the_bias),
}  # fmt: skip


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_mistake_in_the_table_is_noticed(cases: dict[str, Case], what: str) -> None:
    name, mutate = MUTATIONS[what]
    found = run_ranks(run_everything, 1, cases[name], *ONE, mutate=mutate)
    assert largest_difference(cases[name], found) > 0.01


def test_balance_of_a_sigmoid_router_is_of_its_own_scores_and_choices(cases: dict[str, Case]) -> None:
    """Shares of a token's scores, as they sum to 1; counts of what was chosen with bias and groups."""
    case, coefficient = cases["deepseek"], 0.5
    network = load_reference(case.model)
    chosen: list[Tensor] = []
    for layer in network.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda _gate, _args, out: chosen.append(out[2]))

    def balance(logits: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for of_layer, indices in zip(logits, chosen[-len(logits) :], strict=True):
            scores, (length, num_experts) = of_layer.sigmoid(), of_layer.shape
            counts = torch.bincount(indices.flatten(), minlength=num_experts)
            shares = num_experts / (indices.shape[1] * length**2) * counts
            total = total + coefficient * (shares * (scores / scores.sum(-1, keepdim=True)).sum(0)).sum()
        return total

    true = exactness.reference(network, GRPO(config_of(case.model)), case.samples, row_loss=balance)
    overrides = (
        "policy.megatron_cfg.moe_router_load_balancing_type=seq_aux_loss",
        f"policy.megatron_cfg.moe_aux_loss_coeff={coefficient}",
    )
    found = run_ranks(run_everything, 2, case, {"tp": 2, "sp": True}, overrides)[0].update
    gradients = checkpoint_views(true["gradients"], "deepseek_v3")
    off = errors(found, {**true, "gradients": gradients})
    assert off["gradient"] < 2e-5 and off["grad_norm"] < 1e-5, off
    gate = "model.layers.1.mlp.gate.weight"
    assert (gradients[gate] - case.update["gradients"][gate]).norm() > 0.05 * gradients[gate].norm()


# ------------------------------------------------------------------------------------------------ types and checkpoints


def export_in_bf16(model: Path, target: Path) -> float:
    """The grad norm of an update; and an export before it."""
    from megatron_rl.model.weights import export_hf

    config = config_of(model, "trainer.precision=bf16")
    policy = build_policy(config)
    export_hf(policy.chunks, policy.shape, policy.groups, source=model, target=target)
    samples = rows_that_name_themselves(load_reference(model))
    return policy.train_step(samples, GRPO(config).loss)["grad_norm"]


def test_bf16_trains_and_keeps_the_bias_of_the_choice(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["deepseek"]
    [norm] = run_ranks(export_in_bf16, 1, case.model, tmp_path / "hf")
    true = torch.stack([gradient.norm() for gradient in case.update["gradients"].values()]).norm()
    assert norm == pytest.approx(float(true), rel=0.2)
    source, written = (load_file(folder / "model.safetensors") for folder in (case.model, tmp_path / "hf"))
    for name, tensor in source.items():
        is_bias = name.endswith("e_score_correction_bias")
        expected = tensor if is_bias else tensor.bfloat16()
        assert written[name].dtype == expected.dtype and torch.equal(written[name], expected), name


def exports_of_8_bits(model: Path, target: Path) -> list[str]:
    """What loading had to say."""
    from megatron_rl.model import weights

    said: list[str] = []
    weights.logger.warning = said.append
    policy = build_policy(config_of(model, *EP2, dp=2))
    weights.export_hf(policy.chunks, policy.shape, policy.groups, source=model, target=target)
    return said


def test_a_checkpoint_as_deepseek_releases_them(cases: dict[str, Case], tmp_path: Path) -> None:
    """8-bit weights and a prediction layer: what comes out is the dequantised model, and what was left out is said once."""
    source = tmp_path / "source"
    shutil.copytree(cases["deepseek"].model, source)
    generator, stored, expected = torch.Generator().manual_seed(4), load_file(source / "model.safetensors"), {}
    for name, tensor in list(stored.items()):
        if tensor.dim() != 2 or "proj" not in name:
            expected[name] = tensor
            continue
        blocks = torch.rand(-(-tensor.shape[0] // 40), -(-tensor.shape[1] // 24), generator=generator) + 0.5
        stored[name], stored[name + "_scale_inv"] = (tensor * 64).to(torch.float8_e4m3fn), blocks / 64
        whole = (blocks / 64).repeat_interleave(40, 0).repeat_interleave(24, 1)[: tensor.shape[0], : tensor.shape[1]]
        expected[name] = stored[name].float() * whole
    stored["model.layers.4.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((source / "config.json").read_text()) | {
        "num_nextn_predict_layers": 1, "quantization_config": {"quant_method": "fp8", "weight_block_size": [40, 24]},
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(fields))

    said = run_ranks(exports_of_8_bits, 2, source, tmp_path / "hf")
    assert [len(lines) for lines in said] == [1, 0] and "model.layers.4.eh_proj.weight" in said[0][0]
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in fields and fields["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_small_model_of_a_family_is_like_it(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    """What ``megatron-rl doctor`` checks in place of a model."""
    write_small_model(cases[name].model, tmp_path, num_layers=2, num_experts=4, seed=1)
    given, small = read_shape(cases[name].model), read_shape(tmp_path)
    check_coverage(small, HFReader(tmp_path))
    for alike in ("family", "tied", "rope_scaling", "num_shared_experts", "has_query_latent", "norm_topk_prob"):
        assert getattr(given, alike) == getattr(small, alike)
    assert bool(given.num_dense_layers) == bool(small.num_dense_layers)
    assert all(small.has_experts(layer) for layer in range(1, small.num_layers))
    with torch.no_grad():
        logits = load_reference(tmp_path)(torch.arange(40)[None]).logits
    assert logits.std() > 1


# ------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    ("deepseek", {"tp": 2}, (), "sequence_parallel"),
    ("deepseek", {"tp": 1}, ("policy.router_replay=true",), "router_replay"),
    ("deepseek", {"tp": 1}, ("policy.megatron_cfg.moe_router_bias_update_rate=0.001",), "moe_router_bias_update_rate"),
    ("deepseek", {"pp": 4}, (), "pipeline_model_parallel_size"),
    (
        "deepseek",
        {"pp": 2},
        ("policy.megatron_cfg.num_layers_in_first_pipeline_stage=1",),
        "pipeline_model_parallel_size",
    ),
    ("mixtral", {"tp": 1}, ("policy.megatron_cfg.moe_use_legacy_grouped_gemm=true",), "moe_use_legacy_grouped_gemm"),
]


@pytest.mark.parametrize(("name", "layout", "overrides", "field"), REFUSED, ids=str)
def test_what_would_be_wrong_is_refused(
    cases: dict[str, Case], name: str, layout: dict, overrides: tuple[str, ...], field: str
) -> None:
    from megatron_rl.model.build import transformer_config

    model = cases[name].model
    with pytest.raises(UserError) as caught:
        transformer_config(config_of(model, *overrides, **layout), read_shape(model), torch.device("cpu"))
    assert caught.value.field.endswith(field)
