"""Gradients are finite, found without holding a second buffer of their size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl.model import guards


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is not a view."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.elements = max(
                [self.elements, *(x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor))]
            )
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_number_is_found_wherever_it_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "SLICE_ELEMENTS", 16)
    values = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)  # a sum would overflow
    with Largest() as largest:
        assert guards._is_finite(values)
    assert largest.elements <= 2 * math.ceil(1000 / 16)
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 15, 16, 500, 999):
            assert not guards._is_finite(values.clone().index_fill_(0, torch.tensor([place]), bad))
    assert guards._is_finite(values[:0])
