"""FP8 on a CPU: the emulation against slow references and torch's own product, and who is refused what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.config import load_config
from megatron_rl.data.pack import PackLayout, pack, pack_layout
from megatron_rl.errors import UserError
from megatron_rl.model.fp8 import emulation
from megatron_rl.model.fp8.emulation import (
    Fp8Layer,
    Quantizers,
    fp8_product,
    round_tensor,
    round_tiles,
    tensor_scale,
)
from megatron_rl.model.fp8.recipe import Fp8Recipe, check_gpu, recipe_of
from megatron_rl.model.policy import Policy
from megatron_rl.weight_sync.fp8_format import Fp8Format
from megatron_rl.weight_sync.quantize import dequantize, quantize
from tests.forked import run_ranks
from tests.policy_case import build_policy, random_samples, tiny_config
from tests.tiny_models import make_tiny_model

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
close = pytest.approx
FP8 = "policy.megatron_cfg.fp8=hybrid"


def recipe(kind: str, **fields: Any) -> Fp8Recipe:
    found = recipe_of({"fp8": "hybrid", "fp8_recipe": kind, **fields})
    assert found is not None
    return found


def values(*shape: int, seed: int = 0) -> Tensor:
    """Of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-12, 6, shape, generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), spread)


def slow_tiles(x: Tensor, dtype: torch.dtype, tile: tuple[int, int]) -> Tensor:
    """One tile after the other, its scale found by trying."""
    result = torch.zeros_like(x)
    for row in range(0, x.shape[0], tile[0]):
        for column in range(0, x.shape[1], tile[1]):
            part = (slice(row, row + tile[0]), slice(column, column + tile[1]))
            power = -140
            while float(x[part].abs().max()) / 2.0**power > LARGEST[dtype]:
                power += 1
            result[part] = (x[part].double() / 2.0**power).float().to(dtype).float() * 2.0**power
    return result


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("tile", [(1, 32), (32, 1), (1, 128), (128, 128)])
def test_tiles_are_rounded_as_one_by_one(tile: tuple[int, int], dtype: torch.dtype) -> None:
    x = values(150, 170)
    x[3, :40] = 0.0
    x[0, 0], x[40, 129] = LARGEST[dtype] * 2.0**5, -LARGEST[dtype] * 2.0**-3  # exactly at the border: no power wasted
    found = round_tiles(x, dtype, tile)
    assert torch.equal(found, slow_tiles(x, dtype, tile))
    assert torch.equal(round_tiles(found, dtype, tile), found)
    assert not torch.equal(found, x)
    assert torch.equal(round_tiles(x.bfloat16(), dtype, tile).float(), slow_tiles(x.bfloat16().float(), dtype, tile))


def test_a_weight_is_rounded_as_it_is_served() -> None:
    """What training computes with and what a server of eight bits gets are the same numbers."""
    weight = values(200, 300)
    served = dequantize(*quantize("w", weight, Fp8Format("block", power_of_two=True)))
    assert torch.equal(round_tiles(weight, E4M3, (128, 128)), served)


@pytest.mark.parametrize("kind", ["tensorwise", "delayed", "blockwise", "mxfp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(kind: str, value: float) -> None:
    """A cast alone makes infinity 448."""
    x = values(4, 64)
    x[1, 1] = value
    (found, factor), _ = Quantizers(recipe(kind)).operands("input", x, is_training=True)
    assert not bool((found[1, 1] * (1.0 if factor is None else factor)).isfinite())


def test_one_scale_a_tensor_is_what_torch_multiplies() -> None:
    x, weight = values(48, 64), values(32, 64, seed=1)
    (q_x, f_x), (q_w, f_w) = (round_tensor(t, E4M3, tensor_scale(t.abs().amax(), E4M3)) for t in (x, weight))
    theirs = torch._scaled_mm(q_x.to(E4M3), q_w.to(E4M3).t(), scale_a=f_x, scale_b=f_w, out_dtype=torch.float32)
    ours = fp8_product(x, weight, Quantizers(recipe("tensorwise")))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert float((ours - x @ weight.t()).norm() / ours.norm()) > 1e-2


SLOW = {
    "tensorwise": (None, None), "delayed": (None, None), "blockwise": ((1, 128), (128, 128)), "mxfp8": ((1, 32), (1, 32)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("leading", [(80,), (20, 4)])
def test_the_three_products_round_along_what_they_sum_over(kind: str, leading: tuple[int, ...]) -> None:
    """A slip in one direction (tokens for features, e4m3 for e5m2, a product not rounded) fails it."""
    x, weight, gradient = values(80, 96), values(64, 96, seed=1), values(80, 64, seed=2)
    row_tile, weight_tile = SLOW[kind]

    def rounded(t: Tensor, dtype: torch.dtype, tile: tuple[int, int] | None) -> Tensor:
        if tile is not None:
            return slow_tiles(t, dtype, tile)
        scale = 1.0 if kind == "delayed" else LARGEST[dtype] / float(t.abs().max())
        return (t * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype).float() / scale

    def turned(tile: tuple[int, int] | None) -> tuple[int, int] | None:
        return None if tile is None else (tile[1], tile[0])

    leaf_x, leaf_w = x.view(*leading, 96).requires_grad_(), weight.clone().requires_grad_()
    y = fp8_product(leaf_x, leaf_w, Quantizers(recipe(kind)))
    y.backward(gradient.view(*leading, 64))
    assert y.shape == (*leading, 64)
    expected = {
        "y": (y.view(80, 64), rounded(x, E4M3, row_tile) @ rounded(weight, E4M3, weight_tile).t()),
        "dx": (leaf_x.grad.view(80, 96), rounded(gradient, E5M2, row_tile) @ rounded(weight, E4M3, turned(weight_tile))),
        "dw": (leaf_w.grad, rounded(gradient, E5M2, turned(row_tile)).t() @ rounded(x, E4M3, turned(row_tile))),
    }  # fmt: skip
    for name, (found, slow) in expected.items():
        torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5 * float(slow.abs().max()), msg=name)


@pytest.mark.parametrize("kind", SLOW)
def test_an_expert_may_get_no_token(kind: str) -> None:
    x, weight = torch.zeros(0, 64, requires_grad=True), values(32, 64).requires_grad_()
    fp8_product(x, weight, Quantizers(recipe(kind))).sum().backward()
    assert x.grad is not None and weight.grad is not None and not bool(weight.grad.any())


@pytest.mark.parametrize("kind", ["tensorwise", "blockwise"])
def test_sixteen_bits_are_rounded_once(kind: str) -> None:
    """Sums and scales are in float32, as in the hardware."""
    x, weight = values(64, 512).bfloat16(), values(48, 512, seed=1).bfloat16()
    (q_x, f_x), _ = Quantizers(recipe(kind)).operands("input", x, is_training=False)
    (q_w, f_w), _ = Quantizers(recipe(kind)).operands("weight", weight, is_training=False)
    exact = q_x.double() @ q_w.double().t() * (1.0 if f_x is None or f_w is None else float(f_x) * float(f_w))
    found = fp8_product(x, weight, Quantizers(recipe(kind)))
    assert float((found != exact.bfloat16()).float().mean()) < 1e-2


def test_delayed_scaling_uses_what_it_has_seen() -> None:
    def layer(**fields: Any) -> Quantizers:
        return Quantizers(recipe("delayed", **fields))

    def use(quantizers: Quantizers, amax: float, *, is_training: bool = True) -> float:
        return 1.0 / float(quantizers.operands("input", torch.tensor([[amax, 0.5]]), is_training=is_training)[0][1])

    last = layer(fp8_amax_history_len=3)
    assert [use(last, amax) for amax in (4.0, 2.0, 8.0)] == close([1.0, 112.0, 224.0])
    assert [use(last, 1.0, is_training=False) for _ in range(2)] == close([56.0, 56.0])
    largest = layer(fp8_amax_history_len=2, fp8_amax_compute_algo="max")
    assert [use(largest, amax) for amax in (4.0, 2.0, 1.0, 1.0, 0.0)] == close([1.0, 112.0, 112.0, 224.0, 448.0])
    assert use(largest, 1.0) == close(448.0)
    margin = layer(fp8_margin=2)
    assert [use(margin, 4.0), use(margin, 4.0)] == close([1.0, 28.0])
    saturated = layer()
    use(saturated, 1.0)
    (rounded, factor), _ = saturated.operands("input", torch.tensor([[64.0]]), is_training=True)
    assert float(rounded * factor) == close(1.0), (
        "beyond the range of an old scale: at the border, as the hardware has it"
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for tiles."""
    directory = tmp_path_factory.mktemp("wide")
    return make_tiny_model(
        directory, "qwen3", tied=False, seed=3, hidden_size=128, intermediate_size=256, num_hidden_layers=3
    )


def differences(model: Path, *overrides: str) -> tuple[float, set[int]]:
    """Mean change of log-probs, and the layers with eight bits."""

    def measure() -> tuple[list[Tensor], set[int]]:
        policy: Policy = build_policy(tiny_config(model, *overrides))
        rows = random_samples()
        policy.fill_log_probs(rows, [range(len(rows))], "old_log_probs")
        layers = {
            layer.layer_number
            for layer in policy.chunks[0].decoder.layers
            for module in layer.modules()
            if isinstance(module, Fp8Layer) and module.is_quantized
        }
        outside = [m for name, m in policy.chunks[0].named_modules() if "decoder.layers" not in name]
        assert not any(isinstance(module, Fp8Layer) for module in outside), "output layer and embedding keep their type"
        return [row.old_log_probs for row in rows], layers

    (plain, _), (found, layers) = (run_ranks(fn, 1)[0] for fn in (lambda: base(model), measure))
    return float((torch.cat(found) - torch.cat(plain)).abs().mean()), layers


def base(model: Path) -> tuple[list[Tensor], None]:
    rows = random_samples()
    build_policy(tiny_config(model)).fill_log_probs(rows, [range(len(rows))], "old_log_probs")
    return [row.old_log_probs for row in rows], None


@pytest.mark.parametrize("kind", SLOW)
def test_a_model_computes_in_eight_bits_where_it_is_told_to(wide: Path, kind: str) -> None:
    change, layers = differences(wide, FP8, f"policy.megatron_cfg.fp8_recipe={kind}")
    assert layers == {1, 2, 3}
    assert 1e-3 < change < 0.5


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_and_latents_too(family: Any, tmp_path: Path) -> None:
    """The router chooses in the higher precision; what it is given has gone through eight bits."""
    model = make_tiny_model(
        tmp_path, family, tied=False, seed=3, **({} if family == "qwen3_moe" else {"num_hidden_layers": 3})
    )

    def names() -> set[str]:
        policy = build_policy(tiny_config(model, FP8, "policy.megatron_cfg.fp8_recipe=tensorwise"))
        rows = random_samples()
        policy.fill_log_probs(rows, [range(len(rows))], "old_log_probs")
        parts = policy.chunks[0].decoder.named_modules()
        return {name.rsplit(".", 1)[1] for name, module in parts if isinstance(module, Fp8Layer)}

    latents = {"linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj"}
    expected = {"linear_fc1", "linear_fc2", "linear_proj"} | ({"linear_qkv"} if family == "qwen3_moe" else latents)
    assert run_ranks(names, 1) == [expected]


def test_first_and_last_layers_stay_in_the_higher_precision(wide: Path) -> None:
    kept = ("policy.megatron_cfg.fp8_recipe=tensorwise", "policy.megatron_cfg.first_last_layers_bf16=true")
    assert differences(wide, FP8, *kept)[1] == {2}
    both = "policy.megatron_cfg.num_layers_at_start_in_bf16=2"
    assert differences(wide, FP8, *kept, both) == (0.0, set())


@pytest.mark.parametrize(("kind", "multiple"), [("delayed", 16), ("tensorwise", 16), ("blockwise", 16), ("mxfp8", 32)])
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_packs_have_the_lengths_that_the_units_want(wide: Path, kind: str, multiple: int, tp: int, cp: int) -> None:
    config = tiny_config(wide, FP8, f"policy.megatron_cfg.fp8_recipe={kind}", tp=tp, cp=cp, sp=tp > 1)
    layout = pack_layout(config.policy)
    samples = random_samples()
    for rows in ([0], [1, 2], list(range(8))):
        batch = pack(samples, rows, layout)
        of_a_rank = 128 if kind == "blockwise" and tp > 1 else multiple
        assert len(batch.input_ids) % (of_a_rank * tp) == 0
        plain = pack(samples, rows, PackLayout(layout.tp_size, cp))
        assert int(batch.loss_mask.sum()) == int(plain.loss_mask.sum()) > 0


@pytest.mark.parametrize(
    ("kind", "capability", "engine", "cuda", "message"),
    [
        ("delayed", (9, 0), None, (13, 0), "needs Transformer Engine, which is not installed"),
        ("delayed", (8, 0), (2, 11), (13, 0), r"capability 8\.9 or later; this one has 8\.0.*no fp8 at all"),
        ("tensorwise", (8, 0), (2, 11), (13, 0), "no fp8 at all"),
        ("mxfp8", (9, 0), (2, 11), (13, 0), r"10\.0 or later, before 12\.0; this one has 9\.0.*use tensorwise"),
        ("blockwise", (10, 0), (2, 11), (13, 0), r"capability 9\.0, Hopper.*; this one has 10\.0.*use mxfp8"),
        ("blockwise", (8, 9), (2, 11), (13, 0), "use tensorwise"),
        ("blockwise", (9, 0), (2, 2), (13, 0), r"needs Transformer Engine 2\.3 or later; this is 2\.2"),
        ("blockwise", (9, 0), (2, 11), (12, 6), r"needs CUDA 12\.9 or later; this is 12\.6"),
        ("tensorwise", (9, 0), (2, 1), (13, 0), "use delayed"),
        ("mxfp8", (12, 0), (2, 11), (13, 0), r"before 12\.0; this one has 12\.0.*use tensorwise"),
        ("blockwise", (12, 0), (2, 11), (13, 0), "use tensorwise"),
    ],
)
def test_a_gpu_that_cannot_run_a_recipe_is_refused(kind, capability, engine, cuda, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        check_gpu(kind, capability=capability, engine=engine, cuda=cuda)


@pytest.mark.parametrize(
    ("kind", "capability"),
    [("delayed", (8, 9)), ("tensorwise", (9, 0)), ("blockwise", (9, 0)), ("mxfp8", (10, 0)), ("tensorwise", (12, 0))],
)
def test_a_gpu_that_can_is_not(kind: Any, capability: tuple[int, int]) -> None:
    check_gpu(kind, capability=capability, engine=(2, 11), cuda=(13, 0))


CONFIG = Path(__file__).parents[2] / "tiny.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("fp8=e5m2",), "fp8 = 'e5m2': must be one of e4m3, hybrid"),
        (
            ("fp8=hybrid", "fp8_recipe=custom"),
            "fp8_recipe = 'custom': must be one of delayed, tensorwise, blockwise, mxfp8",
        ),
        (("fp8_recipe=blockwise",), "does nothing without policy.megatron_cfg.fp8"),
        (("first_last_layers_bf16=true",), "does nothing without policy.megatron_cfg.fp8"),
        (("fp8=hybrid", "first_last_layers_bf16=true"), "does not go with delayed scaling"),
        (("fp8=hybrid", "fp8_recipe=tensorwise", "fp8_margin=1"), "is of fp8_recipe delayed alone"),
        (("fp8=hybrid", "fp8_recipe=mxfp8", "fp8_wgrad=false"), "is of fp8_recipe delayed alone"),
        (("fp8=hybrid", "num_layers_at_end_in_bf16=2"), "does nothing without first_last_layers_bf16"),
        (("num_layers_at_end_in_bf16=2",), "does nothing without policy.megatron_cfg.fp8"),
        (("fp4=e2m1",), "is not supported"),
        (("fp8=hybrid", "fp8_param=true"), "is not supported: weights would be loaded"),
        (("transformer_impl=inference_optimized",), "must be one of transformer_engine, local"),
    ],
)
def test_settings_that_mean_nothing_are_refused_without_torch(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(CONFIG, ["policy.model_path=x", *(f"policy.megatron_cfg.{text}" for text in overrides)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("transformer_impl=transformer_engine",), "has no kernels for CPUs"),
        (("fp8=hybrid", "fp8_dot_product_attention=true"), "attention in eight bits, which is not emulated"),
        (
            ("fp8=hybrid", "recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"),
            "move the scales",
        ),
        (("fp8=hybrid", "moe_layer_recompute=true"), "move the scales"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(wide: Path, overrides: tuple[str, ...], message: str) -> None:
    def build() -> str:
        try:
            build_policy(tiny_config(wide, *(f"policy.megatron_cfg.{text}" for text in overrides)))
        except UserError as error:
            return str(error)
        return ""

    with pytest.raises(UserError, match=message):
        raise UserError("", "", run_ranks(build, 1)[0], "")


def test_mutations_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding along tokens where features are summed over is another number: the tests above can tell."""
    x, weight = values(80, 96), values(64, 96, seed=1)
    right = fp8_product(x, weight, Quantizers(recipe("mxfp8")))
    monkeypatch.setitem(emulation.ROW_TILES, "mxfp8", (32, 1))
    assert not torch.equal(right, fp8_product(x, weight, Quantizers(recipe("mxfp8"))))
