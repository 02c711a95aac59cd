"""Numerics of FP8 in a model, or of FP8 as it would be: each linear layer, on sampled steps.

Measured on the first micro-batch of a watched step, for each linear layer of the decoder:

    input_amax, weight_amax, gradient_amax   largest magnitudes; the gradient is that of the output
    *_underflow                              share of the numbers that are not zero and become zero
    *_overflow                               share beyond the range of a scale, which only delayed scaling lets happen
    output_error                             norm of Q(x) Q(w)^T - x w^T over norm of x w^T

In a run without FP8 they say what the recipe ``trainer.numerics.forecast`` would do. Every rank looks at what it holds, without
communication; of what several ranks hold, the largest is reported. Under Transformer Engine the rounding is that of
``fp8/emulation.py``, on the layer's own tensors and, under delayed scaling, with its own scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import TE_LINEAR_TYPES, is_first_last_bf16_layer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_rl.config import NumericsConfig
from megatron_rl.convert.tables.table import global_name
from megatron_rl.files import SAME_COMMAND, disk_errors, write_atomic
from megatron_rl.model.attention import WholeLinear
from megatron_rl.model.forward import PolicyModel
from megatron_rl.model.fp8.emulation import Fp8Layer, Quantizers, fp8_product
from megatron_rl.model.fp8.recipe import Fp8Recipe, recipe_of
from megatron_rl.parallel.agree import all_ranks_agree, gather_json
from megatron_rl.parallel.groups import Groups

LINEAR = (ColumnParallelLinear, RowParallelLinear, WholeLinear, *TE_LINEAR_TYPES)
MAX_ROWS = 1024
"""Tokens, evenly drawn, whose outputs are compared: that costs about as much as the layer's forward of so many."""

LayerReport = dict[str, float]


class NumericsMonitor:
    """Hooks on the linear layers of this rank's part of the model, while a step is watched."""

    def __init__(
        self, chunks: Sequence[PolicyModel], config: NumericsConfig, megatron_cfg: Mapping[str, Any], groups: Groups
    ) -> None:
        """Args: the model; when to look, and what is alarming; fields of Megatron's config; process groups."""
        self._config, self._groups = config, groups
        recipe = recipe_of(megatron_cfg) or recipe_of({"fp8": "hybrid", "fp8_recipe": config.forecast})
        assert recipe is not None
        self._recipe: Fp8Recipe = recipe
        is_fp8 = recipe_of(megatron_cfg) is not None
        self._layers = {
            name: module for chunk in chunks for name, module in _linear_layers(chunk, groups.ep_rank, is_fp8=is_fp8)
        }
        self._found: dict[str, LayerReport] = {}
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Look at the next pass of training."""
        self._found = {name: {} for name in self._layers}
        for name, module in self._layers.items():
            found = self._found[name]
            self._handles.append(module.register_forward_pre_hook(partial(self._before, found)))
            self._handles.append(module.register_forward_hook(partial(self._after, found)))

    def report(self) -> dict[str, LayerReport]:
        """Stop looking: what all ranks have seen, by layer; nothing if no step was watched. A collective."""
        for handle in self._handles:
            handle.remove()
        self._handles, mine, self._found = [], self._found, {}
        merged: dict[str, LayerReport] = {}
        for found in gather_json(mine, self._groups.cpu_group):
            for name, values in found.items():
                kept = merged.setdefault(name, {})
                for key, value in values.items():
                    kept[key] = _larger(kept.get(key, -math.inf), value)
        return {name: merged[name] for name in sorted(merged, key=_place) if merged[name]}

    def finish_step(self, step: int, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
        """Return the metrics of a watched step; its layers go to a file of ``folder``, alarms to ``say``. A collective."""
        report = self.report()
        if not report:
            return {}
        alarms = self.alarms(report)
        for line in alarms:
            say(f"numerics at step {step}: {line}")
        with all_ranks_agree(self._groups.cpu_group):
            if self._groups.rank == 0:
                path = folder / f"step_{step:08d}.json"
                with disk_errors(path, field="exp_manager.exp_dir", fix=SAME_COMMAND):
                    write_atomic(path, json.dumps(report, indent=1) + "\n")
        return summary(report) | {"numerics/alarms": float(len(alarms))}

    def alarms(self, report: Mapping[str, LayerReport]) -> list[str]:
        """One line for each kind of number that is beyond its limit, with the layer where it is worst."""
        limits = {
            "underflow": ("max_underflow_frac", self._config.max_underflow_frac),
            "overflow": ("max_overflow_frac", self._config.max_overflow_frac),
            "output_error": ("max_output_error", self._config.max_output_error),
            "amax": ("", math.inf),
        }
        lines = []
        for key in sorted({key for values in report.values() for key in values}):
            field, limit = next(found for ending, found in limits.items() if key.endswith(ending))
            beyond = {name: values[key] for name, values in report.items() if not values.get(key, 0.0) <= limit}
            beyond |= {name: values[key] for name, values in report.items() if not math.isfinite(values.get(key, 0.0))}
            if beyond:
                worst = max(beyond, key=lambda name: _order(beyond[name]))
                rule = f"trainer.numerics.{field} = {limit:g}" if field else "every number should be finite"
                lines.append(f"{key} {beyond[worst]:.3g} in {worst} and {len(beyond) - 1} other layers; {rule}")
        return lines

    def _before(self, found: LayerReport, module: Any, arguments: tuple[Tensor, ...]) -> None:
        """Ahead of the layer, whose pass moves the scales of delayed scaling."""
        if "input_amax" in found or not module.training:
            return
        quantizers = self._quantizers(module)
        with torch.no_grad():
            x, weight = _input_of_product(module, arguments[0]).flatten(0, -2), _weight(module)
            found.update(_range(quantizers, "input", x) | _range(quantizers, "weight", weight))
            x = x[:: -(-len(x) // MAX_ROWS) or 1]
            if not len(x):  # an expert that no token has chosen
                return
            exact = F.linear(x, weight).float()
            error = (fp8_product(x, weight, quantizers).float() - exact).norm() / exact.norm()
            found["output_error"] = float(error) if bool(exact.any()) else 0.0

    def _after(self, found: LayerReport, module: Any, _arguments: Any, output: Any) -> None:
        """Recomputation runs a layer twice; only the second time is there something to derive."""
        result = output[0] if isinstance(output, tuple) else output
        if module.training and result.requires_grad:
            result.register_hook(partial(self._look_at_gradient, found, self._quantizers(module)))

    def _look_at_gradient(self, found: LayerReport, quantizers: Quantizers, gradient: Tensor) -> None:
        if "gradient_amax" not in found:
            found.update(_range(quantizers, "gradient", gradient.detach().flatten(0, -2)))

    def _quantizers(self, module: torch.nn.Module) -> Quantizers:
        if isinstance(module, Fp8Layer):
            return module.quantizers
        if self._recipe.kind != "delayed":
            return Quantizers(self._recipe)
        scales = _engine_scales(module)
        if scales is None:  # there is no past to take them from: what the tensor at hand asks for is the best forecast
            return Quantizers(replace(self._recipe, kind="tensorwise"))
        found = Quantizers(self._recipe)
        found.scale = scales
        return found


def summary(report: Mapping[str, LayerReport]) -> dict[str, float]:
    """``numerics/<key>_max`` over the layers, and ``numerics/output_error_mean``."""
    keys = sorted({key for values in report.values() for key in values})
    row = {f"numerics/{key}_max": max((v[key] for v in report.values() if key in v), key=_order) for key in keys}
    errors = [values["output_error"] for values in report.values() if "output_error" in values]
    return row | ({"numerics/output_error_mean": sum(errors) / len(errors)} if errors else {})


def _linear_layers(chunk: PolicyModel, ep_rank: int, *, is_fp8: bool):  # type: ignore[no-untyped-def]
    """(name with the layer's and expert's place in the whole model, module); without those that FP8 leaves out."""
    config = chunk.config
    first_expert = ep_rank * ((config.num_moe_experts or 0) // config.expert_model_parallel_size)
    for layer in chunk.decoder.layers:
        number = layer.layer_number - 1
        if is_fp8 and is_first_last_bf16_layer(config, number):
            continue
        for name, module in layer.named_modules():
            if isinstance(module, LINEAR):
                yield global_name(f"decoder.layers.0.{name}", number, first_expert).removeprefix("decoder."), module


def _engine_scales(module: Any) -> Tensor | None:
    """[3] float32, on the CPU: what a layer of Transformer Engine multiplies input, weight and gradient by in its next pass,
    under delayed scaling; None before its first pass in eight bits, and for layers without."""
    meta = getattr(module, "fp8_meta", {})
    if not {"scaling_fwd", "scaling_bwd"} <= meta.keys():
        return None
    return torch.stack([*meta["scaling_fwd"].scale[:2], meta["scaling_bwd"].scale[0]]).float().cpu()


def _weight(module: Any) -> Tensor:
    weight = module.weight.detach()
    return weight.dequantize() if hasattr(weight, "dequantize") and weight.dtype.itemsize == 1 else weight


def _input_of_product(module: Any, x: Tensor) -> Tensor:
    """Transformer Engine's fused layers normalise first."""
    scale = getattr(module, "layer_norm_weight", None)
    if scale is None:
        return x
    return F.rms_norm(x.float(), x.shape[-1:], scale.float(), module.eps).to(x.dtype)


def _range(quantizers: Quantizers, role: str, x: Tensor) -> LayerReport:
    """Report the range of one operand [rows, columns]; empty for an expert that got no token."""
    if not x.numel():
        return {}
    amax = x.abs().amax().float()
    (rounded, factor), _ = quantizers.operands(role, x, is_training=False)
    is_lost = (rounded == 0) & (x != 0)
    limit = math.inf if factor is None else torch.finfo(quantizers.dtype(role)).max * factor
    count = x.numel()
    return {
        f"{role}_amax": float(amax),
        f"{role}_underflow": float(is_lost.sum()) / count,
        f"{role}_overflow": float((x.abs().float() > limit * (1 + 1e-6)).sum()) / count,
    }


def _larger(a: float, b: float) -> float:
    return max(a, b, key=_order)


def _order(value: float) -> float:
    """NaN is the worst."""
    return math.inf if math.isnan(value) else value


def _place(name: str) -> tuple[int, str]:
    return int(name.split(".")[1]), name
