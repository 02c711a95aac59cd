"""FP8 linear layers in plain torch: every operand is rounded to what eight bits and a scale can hold, then multiplied as usual.

Of a layer y = x w^T, with g the gradient of y, three products are in eight bits, and each operand is rounded along the
dimension that its product sums over:

    y  = Q(x) Q(w)^T      over inputs
    dx = Q(g) Q(w)        over outputs
    dw = Q(g)^T Q(x)      over tokens

The scales are Transformer Engine's: one a tensor from its largest value (tensorwise) or from those of past passes (delayed);
or powers of two, one for 128 (blockwise) or 32 (mxfp8) elements along the summed dimension, and for 128 x 128 of a weight
under blockwise. What differs from its kernels: sums are those of torch's product; under tensor parallelism an input is scaled
after it has been gathered; infinities become NaN, where they would become the largest number.

Blocks of a row hold elements of one token alone, so with blockwise and mxfp8 log-probs do not depend on what else is in a pack;
with tensorwise they do, and with delayed also on what was computed before.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from megatron_rl.model.fp8.recipe import Fp8Recipe

EMULATED = "emulated_fp8"
"""Attribute of Megatron's config with the ``Fp8Recipe``. The field ``fp8`` stays empty: it would ask for Transformer Engine."""
Tile = tuple[int, int]
"""Rows and columns that share a scale."""
Operand = tuple[Tensor, Tensor | None]
"""Rounded values, and the factor they still lack: [] float32, or None for 1."""

WEIGHT_TILES: dict[str, Tile] = {"blockwise": (128, 128), "mxfp8": (1, 32)}
ROW_TILES: dict[str, Tile] = {"blockwise": (1, 128), "mxfp8": (1, 32)}
"""Tiles of inputs and gradients, for a product that sums over their columns."""


# ---------------------------------------------------------------------------------------------------- rounding


def round_tiles(x: Tensor, dtype: torch.dtype, tile: Tile) -> Tensor:
    """Round ``x`` to eight bits with a power of two as the scale of each tile.

    The scale of a tile is the least power of two that brings its largest value into range, so nothing overflows.

    Args:
        x: [rows, columns] of any floating type.
        dtype: the eight-bit type.
        tile: edge tiles may be smaller.

    Returns:
        [rows, columns] of ``x``'s type, which holds every such value exactly.
    """
    (rows, columns), (height, width) = x.shape, tile
    padded = pad(x, (0, -columns % width, 0, -rows % height)).float()
    tiles = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [R, height, C, width]
    scale = _power_of_two(tiles.abs().amax(dim=(1, 3), keepdim=True), dtype)
    rounded = (tiles / scale).to(dtype).float() * scale
    return rounded.view_as(padded)[:rows, :columns].to(x.dtype)


def _power_of_two(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The least 2^n with amax / 2^n <= the type's largest; 1 for a tile of zeros, NaN for one that is not finite."""
    mantissa, exponent = torch.frexp(amax / torch.finfo(dtype).max)  # mantissa in [0.5, 1)
    scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    # 2^-126 is the least normal float32; what lies below loses bits that nobody sees.
    return _or_nan(torch.where(amax > 0, scale.clamp_min(2.0**-126), 1.0), amax)


def tensor_scale(amax: Tensor, dtype: torch.dtype, *, margin: int = 0) -> Tensor:
    """[] float32: what a tensor with this largest value is multiplied by."""
    scale = torch.finfo(dtype).max / amax.float() / 2.0**margin
    return _or_nan(torch.where(amax > 0, scale.clamp_max(torch.finfo(torch.float32).max), 1.0), amax)


def _or_nan(scale: Tensor, amax: Tensor) -> Tensor:
    """Casts turn infinity into the largest number; what has overflown must be found, not hidden."""
    return torch.where(amax.isfinite(), scale, float("nan"))


def _amax(x: Tensor) -> Tensor:
    """[] float32: the largest |x|; 0 of nothing, which is what an expert may get."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def round_tensor(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Operand:
    """``x * scale`` in eight bits, what is out of range at the border; and the factor 1 / scale."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype).to(x.dtype), 1.0 / scale


# ---------------------------------------------------------------------------------------------------- a layer's operands


class Quantizers:
    """The rounding of one layer's input, weight and output gradient, with the memory of delayed scaling."""

    ROLES = ("input", "weight", "gradient")

    def __init__(self, recipe: Fp8Recipe, amax_group: dist.ProcessGroup | None = None) -> None:
        """Args: the recipe; ranks that share the scales of delayed scaling, as Megatron has it: TP x CP x DP."""
        self.recipe, self._amax_group = recipe, amax_group
        self.history = torch.zeros(len(self.ROLES), recipe.history_len)
        """Delayed scaling: the largest value of each role in past passes, the last one first."""
        self.scale = torch.ones(len(self.ROLES))

    def dtype(self, role: str) -> torch.dtype:
        """The eight-bit type of a role."""
        return self.recipe.backward if role == "gradient" else self.recipe.forward

    def operands(self, role: str, x: Tensor, *, is_training: bool) -> tuple[Operand, Operand]:
        """``x`` [rows, columns] as products see it that sum over its columns, and over its rows."""
        kind, dtype = self.recipe.kind, self.dtype(role)
        if kind in ("tensorwise", "delayed"):
            scale = tensor_scale(_amax(x), dtype) if kind == "tensorwise" else self._delayed(role, x, is_training)
            both = round_tensor(x, dtype, scale)
            return both, both
        height, width = (WEIGHT_TILES if role == "weight" else ROW_TILES)[kind]
        along_columns = round_tiles(x, dtype, (height, width))
        if height == width:
            return (along_columns, None), (along_columns, None)
        return (along_columns, None), (round_tiles(x, dtype, (width, height)) if is_training else along_columns, None)

    def _delayed(self, role: str, x: Tensor, is_training: bool) -> Tensor:
        """The scale that earlier passes ask for; a pass of training leaves its own amax for later ones.

        Args:
            role: whose scale.
            x: the values to come.
            is_training: passes without gradients leave no trace, or log-probs would change what training computes.
        """
        index, recipe = self.ROLES.index(role), self.recipe
        used = self.scale[index].clone()
        if is_training:
            amax = _amax(x).cpu()
            if self._amax_group is not None:
                dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self._amax_group)
            self.history[index] = torch.cat([amax[None], self.history[index, :-1]])
            used = _or_nan(used, amax)
            chosen = self.history[index].amax() if recipe.uses_max else amax
            if chosen > 0 and bool(chosen.isfinite()):
                self.scale[index] = tensor_scale(chosen, self.dtype(role), margin=recipe.margin)
        return used.to(x.device)


class _Product(torch.autograd.Function):
    """x [T, in], w [out, in] -> x w^T [T, out], all three products rounded."""

    @staticmethod
    def forward(ctx, x, weight, quantizers, is_training):  # type: ignore[no-untyped-def]
        x_rows, x_columns = quantizers.operands("input", x, is_training=is_training)
        w_rows, w_columns = quantizers.operands("weight", weight, is_training=is_training)
        if is_training:
            is_rounded = quantizers.recipe.quantizes_weight_gradient
            ctx.quantizers, ctx.x, ctx.weight = quantizers, x_columns if is_rounded else (x, None), w_columns
        return _multiply(x_rows, (w_rows[0].t(), w_rows[1]))

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        rows, columns = ctx.quantizers.operands("gradient", gradient, is_training=True)
        if not ctx.quantizers.recipe.quantizes_weight_gradient:
            columns = (gradient, None)
        return _multiply(rows, ctx.weight), _multiply((columns[0].t(), columns[1]), ctx.x), None, None


def _multiply(a: Operand, b: Operand) -> Tensor:
    """Multiply as the hardware does: sums and scales in float32, rounded once to the type of the operands."""
    product = a[0].float() @ b[0].float()
    for factor in (a[1], b[1]):
        if factor is not None:
            product = product * factor
    return product.to(a[0].dtype)


# ---------------------------------------------------------------------------------------------------- layers


class Fp8Layer:
    """The part that Megatron's two parallel linear layers share in eight bits."""

    is_quantized = True
    """False where Megatron keeps first and last layers in the higher precision."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)  # type: ignore[call-arg]
        sharing = parallel_state.get_amax_reduction_group(
            with_context_parallel=True, tp_only_amax_red=config.tp_only_amax_red
        )
        self.quantizers = Quantizers(getattr(config, EMULATED), sharing)
        # A checkpoint of a layer that was not in eight bits has no such entry.
        self.register_load_state_dict_pre_hook(_without_extra_state)  # type: ignore[attr-defined]

    def _forward_impl(  # type: ignore[no-untyped-def]
        self, input, weight, bias=None, *, allreduce_dgrad=False, sequence_parallel=False, tp_group=None, **others: Any
    ):
        if not self.is_quantized:
            return super()._forward_impl(  # type: ignore[misc]
                input=input, weight=weight, bias=bias, allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel, tp_group=tp_group, **others,
            )  # fmt: skip
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        product = fp8_product(input, weight, self.quantizers)
        return product if bias is None else product + bias

    def get_extra_state(self) -> dict[str, Tensor] | None:
        """Return the memory of delayed scaling, which a checkpoint needs beside the weight."""
        if self.quantizers.recipe.kind != "delayed":
            return None
        return {"history": self.quantizers.history.clone(), "scale": self.quantizers.scale.clone()}

    def set_extra_state(self, state: dict[str, Tensor] | None) -> None:
        """Take over a saved memory. None, or a history of another length, leaves a new one: its scales adapt within a pass."""
        if (
            state
            and self.quantizers.recipe.kind == "delayed"
            and state["history"].shape == self.quantizers.history.shape
        ):
            self.quantizers.history, self.quantizers.scale = state["history"].clone(), state["scale"].clone()


def _without_extra_state(_module: Any, state_dict: dict[str, Any], prefix: str, *_unused: Any) -> None:
    state_dict.setdefault(f"{prefix}_extra_state", None)


def fp8_product(x: Tensor, weight: Tensor, quantizers: Quantizers) -> Tensor:
    """[..., in] times [out, in] transposed -> [..., out]."""
    is_training = torch.is_grad_enabled()
    return _Product.apply(x.reshape(-1, x.shape[-1]), weight, quantizers, is_training).unflatten(0, x.shape[:-1])


class Fp8ColumnParallelLinear(Fp8Layer, ColumnParallelLinear):
    """A layer whose outputs are shared out."""


class Fp8RowParallelLinear(Fp8Layer, RowParallelLinear):
    """A layer whose inputs are shared out."""


_EMULATED = {ColumnParallelLinear: Fp8ColumnParallelLinear, RowParallelLinear: Fp8RowParallelLinear}
_BUILT_OTHERWISE = {"linear_q_down_proj", "linear_kv_down_proj"}
"""Layers that ``LatentAttention`` builds itself: Megatron refuses classes that it does not know for them."""


def emulated(spec: Any) -> Any:
    """A layer spec with eight-bit linear layers in the place of Megatron's own; the router and norms stay."""
    if isinstance(spec, type):
        return _EMULATED.get(spec, spec)
    if isinstance(spec, partial):
        return partial(spec.func, *spec.args, **{name: emulated(value) for name, value in spec.keywords.items()})
    if isinstance(spec, ModuleSpec):
        changed = copy(spec)
        changed.module, changed.submodules = emulated(spec.module), emulated(spec.submodules)
        return changed
    if is_dataclass(spec):
        parts = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in _BUILT_OTHERWISE}
        return replace(spec, **{name: emulated(part) for name, part in parts.items()})  # type: ignore[type-var]
    return [emulated(item) for item in spec] if isinstance(spec, list) else spec


def finish_layers(layers: Iterable[Any], config: TransformerConfig) -> None:
    """Turn eight bits off in a built model where ``first_last_layers_bf16`` says so; on everywhere else.

    Raises:
        RuntimeError: this version of Megatron builds a linear layer in a way that ``emulated`` does not know.
    """
    for layer in layers:
        left_out = [name for name, module in layer.named_modules() if type(module) in _EMULATED]
        if left_out and getattr(config, EMULATED, None):
            raise RuntimeError(f"not in eight bits: {', '.join(left_out)} of layer {layer.layer_number}")
        if is_first_last_bf16_layer(config, layer.layer_number - 1):
            for module in layer.modules():
                if isinstance(module, Fp8Layer):
                    module.is_quantized = False
