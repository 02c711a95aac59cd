"""FP8 weights: rounded as the format demands, whatever the cut, and stored as SGLang and transformers read them."""

from __future__ import annotations

import ast
import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape, read_shape
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.convert.hf.writer import LayoutWriter
from megatron_rl.convert.tables.digest import digest
from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.fp8_format import Fp8Format, is_quantized, quantization_config
from megatron_rl.weight_sync.quantize import (
    block_amax,
    cast,
    dequantize,
    export_fp8,
    quantize,
    quantized,
    quantized_layout,
    scales,
)
from megatron_rl.weight_sync.served import RolloutLayout, check_served
from tests.tiny_models import make_tiny_model

FORMATS = [Fp8Format(granularity, power) for granularity in ("block", "tensor") for power in (False, True)]
SHAPES = [(256, 384), (128, 128), (130, 127), (1, 300), (200, 1)]


def data(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind) + shape[0])
    normal = torch.randn(shape, generator=generator)
    match kind:
        case "normal":
            tensor = normal * 0.02
        case "heavy-tailed":  # Student's t with one degree of freedom
            tensor = normal / torch.randn(shape, generator=generator).abs().clamp_min(1e-6)
        case "tiny":  # down to the subnormal numbers of float32, in the blocks to the right
            tensor = normal * torch.logspace(-30, -44, shape[1])
        case "constant":
            tensor = torch.full(shape, -0.3)
        case "huge":
            tensor = normal.clamp(-1, 1) * 3e38
    return tensor.to(dtype)


def positive_values() -> Tensor:
    """The 127 values of e4m3 from 0 to 448, by definition: sign 1 bit, exponent 4 (bias 7), mantissa 3; no infinity."""
    values = [
        (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
    ]
    return torch.tensor(values[:-1], dtype=torch.float64)  # the last code is NaN


def nearest_even(v: Tensor) -> Tensor:
    """Codes of the nearest values, of two equally near ones the even; beyond 448 the largest."""
    values = positive_values()
    upper = torch.searchsorted(values, v.abs().contiguous()).clamp(1, len(values) - 1)
    lower = upper - 1
    below, above = v.abs() - values[lower], values[upper] - v.abs()
    code = torch.where((below < above) | ((below == above) & (lower % 2 == 0)), lower, upper)
    return (code + 128 * torch.signbit(v)).to(torch.uint8)


def half_step(v: Tensor) -> Tensor:
    exponent = torch.frexp(v).exponent - 1  # v = 1.m * 2^exponent
    return torch.ldexp(torch.ones_like(v), exponent.clamp_min(-6) - 4)


def test_rounding_is_that_of_all_256_values() -> None:
    values = positive_values()
    middles = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, middles, middles * (1 + 2.0**-20), middles * (1 - 2.0**-20)])
    near = torch.cat([near, torch.rand(10_000, dtype=torch.float64) * 448])
    v = torch.cat([near, -near]).float()[None]
    assert torch.equal(cast(v, torch.tensor(1.0)).view(torch.uint8), nearest_even(v.double()))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "tiny", "constant", "huge"])
def test_values_are_within_half_a_step_of_the_format(kind: str, fmt: Fp8Format) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            tensor = data(kind, shape, dtype)
            weight, scale = quantize("w", tensor, fmt)
            assert scale.shape == fmt.scale_shape(shape) and scale.dtype == torch.float32
            x, s = tensor.double(), dequantize(torch.ones(shape).to(weight.dtype), scale).double()
            error = (x - dequantize(weight, scale).double()).abs()
            rounding = 0 if fmt.power_of_two else x.abs() * 2**-22 + 2.0**-149
            assert (error <= s * half_step(x.abs() / s) + rounding).all()
            assert torch.equal(weight.view(torch.uint8), nearest_even((tensor.float() / s.float()).double()))
            # No scale could be smaller: the largest element of a block uses the range, or the scale is at its floor.
            largest = block_amax("w", tensor) if fmt.granularity == "block" else tensor.abs().max().float()
            used = largest / scale
            assert ((used > (223.9 if fmt.power_of_two else 447.9)) | (scale <= 2.0**-126) | (largest == 0)).all()
            if fmt.power_of_two:
                assert (torch.frexp(scale).mantissa == 0.5).all() and (used <= 448).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_any_cut_of_a_tensor_gives_the_same_bits(fmt: Fp8Format) -> None:
    generator = torch.Generator().manual_seed(5)
    for rows, columns in SHAPES:
        tensor = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
        weight, scale = quantize("w", tensor, fmt)
        row_cuts = sorted({0, rows, *torch.randint(0, rows + 1, (2,), generator=generator).tolist()})
        column_cuts = sorted({0, columns, *torch.randint(0, columns + 1, (2,), generator=generator).tolist()})
        pieces = [((a, c), tensor[a:b, c:d]) for a, b in pairwise(row_cuts) for c, d in pairwise(column_cuts)]
        amax = torch.zeros(-(-rows // 128), -(-columns // 128))
        for (a, c), piece in pieces:
            found = block_amax("w", piece, (a, c))
            touched = amax[a // 128 :, c // 128 :][: found.shape[0], : found.shape[1]]
            torch.maximum(touched, found, out=touched)
        known = scales(amax if fmt.granularity == "block" else amax.amax(), fmt)
        assert torch.equal(known, scale)
        for (a, c), piece in pieces:
            end = tuple(-(-(start + size) // 128) for start, size in zip((a, c), piece.shape))
            of_piece = known[a // 128 : end[0], c // 128 : end[1]] if known.dim() else known
            expected = weight[a : a + piece.shape[0], c : c + piece.shape[1]]
            assert torch.equal(cast(piece, of_piece, (a, c)).view(torch.uint8), expected.view(torch.uint8))


def test_zeros_have_scale_one() -> None:
    tensor = torch.zeros(129, 128)
    tensor[128, 5] = 7.0
    weight, scale = quantize("w", tensor, Fp8Format())
    assert scale.tolist() == [[1.0], [7.0 / 448]]
    assert torch.equal(dequantize(weight, scale), tensor)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_named(value: float) -> None:
    tensor = torch.zeros(300, 140)
    tensor[260, 131] = value
    stream = quantized([("model.layers.3.mlp.up_proj.weight", tensor)], Fp8Format())
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.up_proj\.weight.*\[260, 131\] is not finite"):
        list(stream)


def sglang_functions(file: str, *names: str) -> list[Any]:
    """SGLang's own functions, from their source: importing the package takes ten seconds, and a process of its own."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SGLang is not installed")
    path = Path(spec.submodule_search_locations[0]) / "srt/layers/quantization" / file
    found = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names]
    helpers = {"ceil_div": lambda a, b: -(-a // b), "ceil_align": lambda a, b: -(-a // b) * b}
    defined: dict[str, Any] = {"torch": torch, **helpers}
    exec(compile(ast.Module(found, []), path, "exec", flags=annotations.compiler_flag), defined)
    return [defined[name] for name in names]


def test_transformers_and_sglang_read_the_same_numbers() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    (block_quant_dequant,) = sglang_functions("fp8_utils.py", "block_quant_dequant")
    for shape in ((256, 384), (130, 127)):
        weight, scale = quantize("w", data("heavy-tailed", shape, torch.float32), Fp8Format())
        ours = dequantize(weight, scale)
        assert torch.equal(block_quant_dequant(weight, scale, [128, 128], torch.float32), ours)
        if shape[0] % 128 == 0:  # transformers takes rows / scale rows for the height of a block
            theirs = Fp8Dequantize(None).convert({"weight$": [weight], "weight_scale_inv": [scale]})["weight"]
            assert torch.equal(theirs, ours)


def test_scales_that_are_powers_of_two_survive_sglang_on_blackwell() -> None:
    """There it rounds blocks to e8m0 scales, through bfloat16; ours must stand for the same numbers afterwards."""
    names = ("block_quant_dequant", "quant_weight_ue8m0", "per_block_cast_to_fp8", "ceil_to_ue8m0")
    block_quant_dequant, quant_weight_ue8m0, *_ = sglang_functions("fp8_utils.py", *names)
    tensor = data("normal", (256, 384), torch.float32)
    tensor[0, 0] = 225 / 256  # rounds down to 224: they find half our scale
    for power_of_two in (True, False):
        weight, scale = quantize("w", tensor, Fp8Format(power_of_two=power_of_two))
        again = quant_weight_ue8m0(block_quant_dequant(weight, scale, [128, 128], torch.bfloat16), [128, 128])
        assert torch.equal(dequantize(*again), dequantize(weight, scale)) == power_of_two


def test_parts_of_a_fused_layer_survive_sglang_fusing_them() -> None:
    """SGLang brings the parts to their largest scale through float16, which is exact for scales from 2^-15."""
    (per_tensor_dequantize,) = sglang_functions("utils.py", "per_tensor_dequantize")
    generator = torch.Generator().manual_seed(2)
    tensors = [
        (f"model.layers.0.self_attn.{part}_proj.weight", torch.randn(64, 64, generator=generator) * factor)
        for part, factor in zip("qkv", (1, 2, 4))
    ]
    sent = dict(quantized(tensors, Fp8Format("tensor")))
    found = [tensor for name, tensor in sent.items() if name.endswith("weight_scale")]
    assert len(found) == 3 and {*map(float, found)} == {float(max(t.abs().max() for _, t in tensors) / 448)}
    for scale, survives in ((found[0], True), (torch.tensor(2.0**-15), True), (torch.tensor(2.0**-18), False)):
        again = [cast(per_tensor_dequantize(sent[name], scale), scale) for name, _ in tensors]
        same = [torch.equal(a.view(torch.uint8), sent[name].view(torch.uint8)) for a, (name, _) in zip(again, tensors)]
        assert all(same) == survives


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("model"), "qwen3_moe", tied=False, seed=1, dtype="bfloat16", attention_bias=True
    )


@pytest.fixture(scope="module")
def shape(model: Path) -> ModelShape:
    return read_shape(model)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_stream_is_what_the_layout_says(model: Path, shape: ModelShape, fmt: Fp8Format) -> None:
    tensors = load_file(model / "model.safetensors")
    order = sorted(tensors, key=lambda name: name[::-1])  # parts of a layer apart from each other
    digests: dict[str, int] = {}
    sent = dict(quantized(((name, tensors[name]) for name in order), fmt, digests=digests))
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sent.items()}
    assert found == quantized_layout(hf_tensors(shape), fmt, torch.bfloat16)
    suffix = "_scale_inv" if fmt.granularity == "block" else "_scale"
    assert f"model.layers.1.self_attn.q_proj.weight{suffix}" in sent
    for name, tensor in tensors.items():
        if not is_quantized(name, tuple(tensor.shape)):
            assert torch.equal(sent[name], tensor)
    flat = {name: tensor.reshape(-1) if tensor.dim() == 0 else tensor for name, tensor in sent.items()}
    assert digests == {n: digest(n, t, (0,) * t.dim(), tuple(t.shape)) for n, t in flat.items()}
    eight_bits = {name.split(".")[-2] for name, tensor in sent.items() if tensor.dtype == torch.float8_e4m3fn}
    assert eight_bits == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_files_with_several_types_can_be_mapped(model: Path, tmp_path: Path) -> None:
    """An odd number of bytes in front of a float32 would leave it where no reader can map it."""
    tensors = {"a": torch.ones(3, 5).to(torch.float8_e4m3fn), "b": torch.randn(2), "c": torch.randn(3).bfloat16()}
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with LayoutWriter(tmp_path / "out", layout, source=model) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name).float(), tensor.float()) for name, tensor in tensors.items())
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    places = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert all(places[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())


def test_fp8_checkpoint(model: Path, shape: ModelShape, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.utils.quantization_config import FineGrainedFP8Config

    tensors = load_file(model / "model.safetensors")
    fmt = Fp8Format(power_of_two=True)
    digests = export_fp8(tensors.items(), tmp_path / "out", shape, fmt, source=model)
    reader = HFReader(tmp_path / "out")
    expected = dict(quantized(tensors.items(), fmt))
    assert reader.names == set(expected) == set(digests)
    for name, tensor in expected.items():
        found = reader.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
    loaded = FineGrainedFP8Config(**AutoConfig.from_pretrained(tmp_path / "out").quantization_config)
    assert list(loaded.weight_block_size) == [128, 128] and "lm_head" in loaded.modules_to_not_convert
    assert json.loads((model / "config.json").read_text()).get("quantization_config") is None


def test_a_checkpoint_with_a_weight_that_diverged_is_not_written(
    model: Path, shape: ModelShape, tmp_path: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = float("nan")
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.o_proj"):
        export_fp8(tensors.items(), tmp_path / "out", shape, Fp8Format(), source=model)
    assert list(tmp_path.iterdir()) == []


def test_what_stays_as_it_is() -> None:
    layer = "model.layers.4.mlp."
    names = {f"{layer}gate.weight": (8, 64), f"{layer}gate.e_score_correction_bias": (8,), "lm_head.weight": (131, 64)}
    names |= {"model.norm.weight": (64,), "model.layers.4.self_attn.q_proj.bias": (64,)}
    layout = quantized_layout(names, Fp8Format(), torch.bfloat16)
    assert list(layout) == list(names)
    assert [name for name in layout if layout[name][1] != torch.bfloat16] == [f"{layer}gate.e_score_correction_bias"]
    for name in ("self_attn.kv_a_proj_with_mqa", "mlp.experts.3.w2", "mlp.shared_experts.up_proj"):
        assert is_quantized(f"model.layers.4.{name}.weight", (64, 64))


def test_one_scale_a_tensor_states_no_block_size() -> None:
    config = quantization_config(["model.layers.0.mlp.gate.weight", "lm_head.weight"], Fp8Format("tensor"))
    assert "weight_block_size" not in config and "scale_fmt" not in config
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.gate"]


def test_layouts_that_sglang_would_refuse(model: Path, shape: ModelShape, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout\.sglang_cfg\.tp_size = 1: a rank holds 64 rows of .*k_proj"):
        check_served(shape, Fp8Format(), RolloutLayout(tp_size=1))
    check_served(shape, Fp8Format("tensor"), RolloutLayout(tp_size=2))
    fields = {"hidden_size": 192, "head_dim": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    wide = read_shape(make_tiny_model(tmp_path, "qwen3", tied=True, seed=0, **fields))
    check_served(wide, Fp8Format(), RolloutLayout(tp_size=2))
    with pytest.raises(UserError, match=r"tp_size = 4: a rank holds 64 rows of .*gate_proj"):
        check_served(wide, Fp8Format(), RolloutLayout(tp_size=4))
