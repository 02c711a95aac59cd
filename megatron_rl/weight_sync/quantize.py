"""FP8 weights for rollout servers: quantisation of whole tensors, or of any rectangle of one.

    q = e4m3(x / scale),  x' = q * scale,  scale = max |x| / 448 over a block

    granularity   a block is                    its scale               read by
    block         128 x 128 of the tensor       NAME_scale_inv [R, C]   SGLang, transformers (DeepSeek-V3's format)
    tensor        all parts of a fused layer    NAME_scale []           SGLang

Only the linear layers of the decoder are quantised. Embedding, output layer, router, norms and biases keep their type.

e4m3 has three bits of mantissa, and steps of 2^-9 below 2^-6. So with v = |x| / scale, half a step is

    |x - x'| <= scale * 2^(max(floor(log2 v), -6) - 4) + |x| * 2^-22

at most max|x| / 28 of a block. The last term is float32's rounding; it is zero if scales are powers of two.

All parts of a fused layer share one scale, because SGLang would take the largest of several and round the other parts again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_rl.convert.architecture.shape import Dtype, ModelShape
from megatron_rl.convert.hf.writer import HFLayout, LayoutWriter
from megatron_rl.convert.tables.digest import digest
from megatron_rl.convert.tables.kinds import Extent
from megatron_rl.convert.tables.table import hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.fp8_format import (
    BLOCK,
    Fp8Format,
    grid,
    is_quantized,
    parts_of_fused,
    quantization_config,
)

FP8 = torch.float8_e4m3fn
LARGEST = 448.0

_SMALLEST_SCALE = 2.0**-126
"""The least normal float32: a quotient by less could overflow, and GPUs may flush less to zero."""
_BAND_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
"""Elements widened to float32 at a time: they fit a core's cache, or keep a GPU busy."""


Padding = tuple[int, int, int, int]
"""(left, right, top, bottom)."""


def block_amax(name: str, piece: Tensor, start: Extent = (0, 0)) -> Tensor:
    """Return the largest |x| of each block that a rectangle of a tensor touches.

    If ranks hold parts of one block, the maximum over the ranks is the block's.

    Args:
        name: of the tensor, for messages.
        piece: [rows, columns] of any floating type.
        start: its corner in the tensor.

    Returns:
        [block rows, block columns] float32; the first is the block of ``start``.

    Raises:
        UserError: the piece holds infinities or NaN.
    """
    touched, bands = _bands(piece, start)
    found = piece.new_empty(touched, dtype=torch.float32)
    for rows, blocks, padding in bands:
        band = _padded(piece[rows].float().abs(), padding)
        found[blocks] = band.unflatten(0, (-1, BLOCK)).amax(1).unflatten(1, (-1, BLOCK)).amax(2)
    if not torch.isfinite(found).all():
        where = (~torch.isfinite(piece)).nonzero()[0].tolist()
        rule = f"{[a + b for a, b in zip(start, where)]} is not finite, which eight bits with a scale cannot express"
        raise UserError(f"tensor {name}", float(piece[tuple(where)]), rule, "find out at which step training diverged")
    return found


def scales(amax: Tensor, fmt: Fp8Format) -> Tensor:
    """Return the scales of blocks with these largest values; 1 for a block of zeros.

    Args:
        amax: float32 of any shape, finite and not negative.
        fmt: says whether they are powers of two.
    """
    if fmt.power_of_two:
        mantissa, exponent = torch.frexp(amax)  # 448 is 0.875 * 2^9: whole numbers, so nothing is rounded
        scale = torch.ldexp(torch.ones_like(amax), exponent - 9 + (mantissa > LARGEST / 2**9).int())
    else:
        scale = amax / LARGEST
    return torch.where(amax == 0, 1.0, scale.clamp_min(_SMALLEST_SCALE))


def cast(piece: Tensor, scale: Tensor, start: Extent = (0, 0)) -> Tensor:
    """Quantise a rectangle whose scales are known; the result does not depend on how the tensor was cut.

    Args:
        piece: [rows, columns] of any floating type, finite.
        scale: one number for all of it ([]), or one for each block that it touches, as ``block_amax`` returns them.
        start: corner of the piece in the tensor.

    Returns:
        [rows, columns] float8_e4m3fn.
    """
    result = torch.empty(piece.shape, dtype=FP8, device=piece.device)
    _, bands = _bands(piece, start)
    for rows, blocks, (left, right, top, bottom) in bands:
        band = piece[rows].float()
        if scale.dim() == 0:
            quotient = band / scale
        else:
            padded = _padded(band, (left, right, top, bottom))
            parts = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)) / scale[blocks][:, None, :, None]
            height, width = padded.shape
            quotient = parts.view(height, width)[top : height - bottom, left : width - right]
        # Rounding of the scale may leave the largest element a hair above 448.
        result[rows] = quotient.clamp(-LARGEST, LARGEST).to(FP8)
    return result


def quantize(name: str, tensor: Tensor, fmt: Fp8Format, *, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a whole tensor.

    Args:
        name: for messages.
        tensor: [rows, columns] of any floating type.
        fmt: the format.
        amax: float32, if the tensor shares its scale with others: the largest |x| of all of them.

    Returns:
        (weight [rows, columns] float8_e4m3fn, scale float32 of ``fmt.scale_shape``).

    Raises:
        UserError: the tensor holds infinities or NaN.
    """
    if amax is None:
        amax = block_amax(name, tensor)
        if fmt.granularity == "tensor":
            amax = amax.amax()
    scale = scales(amax, fmt)
    return cast(tensor, scale), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values that a quantised tensor stands for: the slow reference.

    Args:
        weight: [rows, columns] float8_e4m3fn.
        scale: float32, [] or one a block.
        dtype: of the result; the product is a float32.
    """
    if scale.dim():
        rows, columns = weight.shape
        scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    return (weight.float() * scale).to(dtype)


def quantized(
    tensors: Iterable[tuple[str, Tensor]], fmt: Fp8Format, *, digests: dict[str, int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Quantise the trained model's tensors for servers that hold FP8 weights.

    Args:
        tensors: (Hugging Face name, tensor), any order, any device. With ``granularity="tensor"`` the parts of a fused
            layer are held until all have come: they must not change until then.
        fmt: the server's format.
        digests: receives the digest of each tensor that is yielded, by name. One of no dimensions counts as [1].

    Yields:
        Each weight in eight bits followed by its scales; every other tensor as it came.

    Raises:
        UserError: a weight holds infinities or NaN.
    """
    for name, tensor in _quantized(tensors, fmt):
        if digests is not None:
            flat = tensor.reshape(1) if tensor.dim() == 0 else tensor
            digests[name] = digest(name, flat, (0,) * flat.dim(), tuple(flat.shape))
        yield name, tensor


def _quantized(tensors: Iterable[tuple[str, Tensor]], fmt: Fp8Format) -> Iterator[tuple[str, Tensor]]:
    waiting: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if not is_quantized(name, tuple(tensor.shape)):
            yield name, tensor
        elif fmt.granularity == "block":
            yield from _named(name, quantize(name, tensor, fmt), fmt)
        else:
            parts = parts_of_fused(name)
            group = waiting.setdefault(parts, {})
            group[name] = tensor
            if len(group) == len(parts):
                yield from _with_one_scale(waiting.pop(parts), fmt)
    for group in waiting.values():  # some DeepSeek models have no q_a_proj
        yield from _with_one_scale(group, fmt)


def _with_one_scale(group: dict[str, Tensor], fmt: Fp8Format) -> Iterator[tuple[str, Tensor]]:
    amax = torch.stack([block_amax(name, tensor).amax() for name, tensor in group.items()]).amax()
    for name, tensor in group.items():
        yield from _named(name, quantize(name, tensor, fmt, amax=amax), fmt)


def _named(name: str, found: tuple[Tensor, Tensor], fmt: Fp8Format) -> Iterator[tuple[str, Tensor]]:
    yield name, found[0]
    yield fmt.scale_name(name), found[1]


def quantized_layout(extents: Mapping[str, Extent], fmt: Fp8Format, dtype: torch.dtype) -> HFLayout:
    """Return shape and dtype of each tensor that ``quantized`` yields.

    Args:
        extents: of the model's own tensors (``convert.tables.table.hf_tensors``).
        fmt: the format.
        dtype: of those that are not quantised.
    """
    layout: dict[str, tuple[Extent, torch.dtype]] = {}
    for name, extent in extents.items():
        if is_quantized(name, extent):
            layout[name] = (extent, FP8)
            layout[fmt.scale_name(name)] = (fmt.scale_shape(extent), torch.float32)
        else:
            layout[name] = (extent, _kept_dtype(name, dtype))
    return layout


def _kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor that is not quantised; small differences of a correction bias need float32."""
    return torch.float32 if name.endswith(".e_score_correction_bias") else dtype


def export_fp8(
    tensors: Iterable[tuple[str, Tensor]], directory: str | Path, shape: ModelShape, fmt: Fp8Format, *,
    source: str | Path, dtype: Dtype | None = None,
) -> dict[str, int]:  # fmt: skip
    """Write a Hugging Face checkpoint in FP8, whole or not at all, for a server given by URL to start from.

    Args:
        tensors: (Hugging Face name, tensor): all of the model's, in any order.
        directory: the new checkpoint; must not exist, or be empty.
        shape: of the model.
        fmt: the format.
        source: the checkpoint that the model came from.
        dtype: of tensors that are not quantised; by default the source's.

    Returns:
        Digest of each written tensor.

    Raises:
        UserError: a weight holds infinities or NaN; or as for ``LayoutWriter``.
    """
    name_of_dtype: Dtype = dtype or shape.dtype
    kept: torch.dtype = getattr(torch, name_of_dtype)
    extents = hf_tensors(shape)
    config = {"quantization_config": quantization_config(extents, fmt), "torch_dtype": name_of_dtype}
    digests: dict[str, int] = {}
    layout = quantized_layout(extents, fmt, kept)
    typed = ((name, tensor if layout[name][1] == FP8 else tensor.to(layout[name][1])) for name, tensor in tensors)
    with LayoutWriter(directory, layout, source=source, config=config) as writer:
        for name, tensor in quantized(typed, fmt, digests=digests):
            writer.add(name, tensor)
    return digests


def _padded(band: Tensor, padding: Padding) -> Tensor:
    return pad(band, padding) if any(padding) else band  # torch copies even without padding


def _bands(piece: Tensor, start: Extent) -> tuple[Extent, Iterator[tuple[slice, slice, Padding]]]:
    """Cut a rectangle into bands of whole block rows.

    Returns:
        (number of blocks touched along each dimension; of each band: its rows in the piece, its block rows, and the padding
        (left, right, top, bottom) that completes its blocks).
    """
    rows, columns = piece.shape
    top, left = (place % BLOCK for place in start)
    touched = grid((top + rows, left + columns))
    right = touched[1] * BLOCK - left - columns
    per_band = max(1, _BAND_ELEMENTS.get(piece.device.type, 2**19) // (touched[1] * BLOCK * BLOCK))

    def bands() -> Iterator[tuple[slice, slice, Padding]]:
        for first in range(0, touched[0], per_band):
            last = min(first + per_band, touched[0])
            begin, end = first * BLOCK - top, last * BLOCK - top
            inside = slice(max(0, begin), min(rows, end))
            yield inside, slice(first, last), (left, right, inside.start - begin, end - inside.stop)

    return touched, bands()
