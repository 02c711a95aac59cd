"""The digest of a tensor: the same however it is cut, another for whatever else is changed."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megatron_rl.convert.tables.digest import MASK, as_text, digest

NAME = "model.layers.3.mlp.down_proj.weight"


def whole(tensor: Tensor, name: str = NAME) -> int:
    return digest(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape))


def by_hand(tensor: Tensor, name: str = NAME) -> int:
    """Element by element, with Python's integers."""
    from megatron_rl.convert.tables.digest import _weights

    rows, columns = tensor.shape
    size = tensor.element_size()
    per_word = 8 // size
    a = [int(x) for x in _weights(f"rows of {name}", rows, torch.device("cpu"))]
    b = [int(x) for x in _weights("columns", -(-columns // per_word), torch.device("cpu"))]
    bits = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).tolist()
    return MASK & sum(
        ((bits[i][j] % 2 ** (8 * size)) << (8 * size * (j % per_word))) * a[i] * b[j // per_word]
        for i in range(rows)
        for j in range(columns)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_sum_that_the_docstring_states(dtype: torch.dtype) -> None:
    tensor = torch.randn(13, 29).to(dtype)
    assert whole(tensor) == by_hand(tensor)
    assert len(as_text(whole(tensor))) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_blocks_of_any_cut_add_up(dtype: torch.dtype) -> None:
    generator = random.Random(0)
    tensor = torch.randn(37, 53).to(dtype)
    for _ in range(20):
        row, column = generator.randrange(1, 37), generator.randrange(1, 53)
        parts = [
            digest(NAME, tensor[rows, columns], (rows.start, columns.start), (37, 53))
            for rows in (slice(0, row), slice(row, 37))
            for columns in (slice(0, column), slice(column, 53))
        ]
        assert sum(parts) & MASK == whole(tensor)


def test_long_tensors_are_summed_in_blocks() -> None:
    tensor = torch.randn(3000, 200)
    parts = [digest(NAME, tensor[i : i + 7], (i, 0), (3000, 200)) for i in range(0, 3000, 7)]
    assert sum(parts) & MASK == whole(tensor)


def test_vectors_and_strides_count_alike() -> None:
    vector = torch.randn(64)
    for start in (8, 9, 10):  # in whole words, and not
        mine = vector[start : start + 9]
        assert digest("norm", mine, (start,), (64,)) == digest("norm", mine.clone(), (start,), (64,))
    tensor = torch.randn(20, 30)
    assert whole(tensor.t().contiguous().t()) == whole(tensor)


@pytest.mark.parametrize("column", [2, 3, 6])
def test_every_single_bit_counts(column: int) -> None:
    tensor = torch.randn(5, 7)
    before = whole(tensor)
    for bit in range(32):
        changed = tensor.clone()
        changed.view(torch.int32)[3, column] ^= (1 << bit) if bit < 31 else -(2**31)
        assert whole(changed) != before


def test_order_counts() -> None:
    tensor = torch.randn(8, 8)
    before = whole(tensor)
    assert whole(tensor[torch.tensor([1, 0, *range(2, 8)])]) != before
    assert whole(tensor[:, torch.tensor([1, 0, *range(2, 8)])]) != before
    assert whole(tensor.t()) != before
    assert whole(tensor, "another") != before
    signs = tensor.clone()
    signs[2:4] *= -1  # an even number of sign bits
    assert whole(signs) != before


def test_zeros_of_both_signs_and_nans_differ() -> None:
    assert whole(torch.tensor([[0.0]])) != whole(torch.tensor([[-0.0]]))
    nans = torch.tensor([[0x7FC00000, 0x7FC00001]], dtype=torch.int32).view(torch.float32)
    assert whole(nans[:, :1]) != whole(nans[:, 1:])
