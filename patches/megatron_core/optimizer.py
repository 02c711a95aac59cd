"""Save and load the distributed optimizer when the inner one is torch's Adam.

Why: without Transformer Engine and Apex the inner optimizer is torch's, which has no state before its first step and
    one ``step`` tensor per parameter. So ``sharded_state_dict`` fails on a fresh optimizer, the loader misses ``step``
    among the per-parameter tensors, and it hands all parameters the *same* tensor: each step after a resume then
    advances the count once per parameter, the bias corrections are wrong, and nothing says so.
Upstream: ``DistributedOptimizer.state_dict``, ``.load_state_dict``, ``.sharded_state_dict`` and
    ``._set_main_param_and_optimizer_states`` in megatron/core/optimizer/distrib_optimizer.py
Versions: 0.16.1 - 0.19.2 (tested on both; in 0.19 still one tensor for all)
Remove when: upstream clones the step for each parameter (as it does for ``HybridDeviceOptimizer``) and allocates the
    state before it builds the sharded state dict.
Tested by: tests/unit/patches/test_patch_optimizer.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .upstream import replace


def apply() -> None:
    """Wrap three methods of ``DistributedOptimizer``; with Transformer Engine or Apex there is nothing to do."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer = distrib_optimizer.DistributedOptimizer
    replace(optimizer, "sharded_state_dict", _with_state)
    replace(optimizer, "_set_main_param_and_optimizer_states", _with_step)
    replace(optimizer, "load_state_dict", _with_own_steps)


def _with_state(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        _allocate(self.optimizer)
        return original(self, *args, **kwargs)

    return sharded_state_dict


def _allocate(inner: torch.optim.Optimizer | None) -> None:
    """Give each parameter the state that Adam's first step would start from."""
    if not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }


def _with_step(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_states(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        # The checkpoint holds the step once, with the groups; load_state_dict has set it already: copy it to itself.
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    return set_states


def _with_own_steps(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    return load_state_dict
