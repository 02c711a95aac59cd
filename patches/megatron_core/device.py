"""Let Megatron-Core name the CPU where it says CUDA.

Why: Megatron asks ``torch.cuda`` for the device, for streams and events, and creates tensors with ``device="cuda"`` or
    in pinned memory; the optimizers accept parameters only if ``Tensor.type()`` is spelled ``torch.cuda.*Tensor``.
    Without CUDA each of these raises.
Upstream: ``torch.cuda.current_device`` and ``device="cuda"`` throughout megatron.core, among others in
    ``forward_backward_no_pipelining``, ``get_grad_norm_fp32``, ``exchange_loaded_tensors_gather_rounds`` and
    ``MoEAlltoAllTokenDispatcher``; ``get_pos_emb_on_this_cp_rank`` (pinned memory); ``Tensor.type()`` in the three
    functions of ``_FUNCTIONS_THAT_READ_TYPE_NAMES``
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1 and 0.19.2)
Remove when: Megatron takes the device from its config or from ``torch.accelerator``.
Tested by: tests/unit/patches/test_patch_device.py

How: each loaded megatron.core module gets another value for its global name ``torch``: a view of the real module in
which the tensor factories and ``cuda`` are ours. The real ``torch`` and ``torch.cuda`` stay as they are for everybody
else. Other ways were weighed. A ``TorchFunctionMode`` costs a Python call for every operation of the model, and does
not see ``torch.cuda``. Rewriting the constant "cuda" in code objects reaches strings that mean something else, and has
to know functions, wrappers and closures. Changing ``torch.zeros`` or ``torch.cuda`` themselves would lie to every other
library of the process. Two methods of tensors cannot be reached through a module's names: ``cuda()``, which would raise
here anyway, is the identity, and ``type()`` is changed only while one of three functions runs.

A module of megatron.core that is imported later keeps the real ``torch`` and fails loudly at its first use of CUDA: add
it to ``_MODULES`` in ``__init__.py`` then.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch

from .upstream import replace

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
_FUNCTIONS_THAT_READ_TYPE_NAMES = (
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer", "__init__"),
    ("megatron.core.optimizer.optimizer", "Float16OptimizerWithFloat16Params", "__init__"),
    ("megatron.core.optimizer.clip_grads", None, "clip_grad_by_total_norm_fp32"),
    ("megatron.core.optimizer.optimizer", None, "clip_grad_by_total_norm_fp32"),  # imported by name
)


class View(ModuleType):
    """A module seen through a few replaced names; all other names are looked up in the real one at each use."""

    def __init__(self, real: ModuleType) -> None:
        super().__init__(real.__name__, real.__doc__)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Event:
    """A CUDA event where everything is synchronous: a time stamp."""

    def __init__(self, *_args: object, **_options: object) -> None:
        self._recorded_s = time.perf_counter()

    def record(self, stream: Stream | None = None) -> None:
        """Take the time."""
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing runs elsewhere."""

    def synchronize(self) -> None:
        """Nothing runs elsewhere."""

    def query(self) -> bool:
        """Everything before has finished."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``, the unit of torch."""
        return 1000.0 * (end._recorded_s - self._recorded_s)


class Stream:
    """A CUDA stream where everything is synchronous."""

    def __init__(self, *_args: object, **_options: object) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        """Nothing runs elsewhere."""

    def wait_event(self, event: Event) -> None:
        """Nothing runs elsewhere."""

    def synchronize(self) -> None:
        """Nothing runs elsewhere."""

    def query(self) -> bool:
        """Everything before has finished."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record ``event``, or a new one."""
        event = event or Event()
        event.record(self)
        return event


def apply() -> None:
    """Give every loaded module of megatron.core the views, and the two tensor methods what they need."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            module.torch = torch_view  # type: ignore[attr-defined]
    torch.Tensor.cuda = _stay_on_cpu  # type: ignore[method-assign, assignment]
    for module_name, class_name, function in _FUNCTIONS_THAT_READ_TYPE_NAMES:
        owner = importlib.import_module(module_name)
        replace(getattr(owner, class_name) if class_name else owner, function, _with_cuda_type_names)


def _stay_on_cpu(tensor: torch.Tensor, *_args: object, **_options: object) -> torch.Tensor:
    return tensor


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``Tensor.type()`` spell ``torch.FloatTensor`` as ``torch.cuda.FloatTensor`` while ``function`` runs."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "type" in vars(torch.Tensor):  # inside another of these functions
            return function(*args, **kwargs)
        torch.Tensor.type = _type_as_on_cuda  # type: ignore[method-assign, assignment]
        try:
            return function(*args, **kwargs)
        finally:
            del torch.Tensor.type  # uncovers the inherited method

    return wrapper


def _type_as_on_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    answer = super(torch.Tensor, tensor).type(*args, **kwargs)
    if isinstance(answer, str) and not answer.startswith("torch.cuda."):
        return answer.replace("torch.", "torch.cuda.", 1)
    return answer


def _cpu_for_cuda(device: Any) -> Any:
    """The device to use: the CPU for "cuda", "cuda:3" or ``torch.device("cuda")``, else what was asked for."""
    return _CPU if str(device).startswith("cuda") else device


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Create on the CPU, and never pinned: torch raises when there is no accelerator to pin for."""

    @functools.wraps(factory)
    def wrapper(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device=_cpu_for_cuda(device), **kwargs)

    return wrapper


def _do_nothing(*_args: object, **_options: object) -> None:
    pass


def _no_stream_to_enter(*_args: object) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def _make_cuda_view() -> View:
    view = View(torch.cuda)
    only_stream = Stream()
    nvtx = View(torch.cuda.nvtx)
    nvtx.range_push = nvtx.range_pop = _do_nothing  # type: ignore[attr-defined]
    ours = {
        "Event": Event,
        "Stream": Stream,
        "current_device": lambda: _CPU,
        "current_stream": lambda device=None: only_stream,
        "default_stream": lambda device=None: only_stream,
        "nvtx": nvtx,
        "set_device": _do_nothing,
        "stream": _no_stream_to_enter,
        "synchronize": _do_nothing,
    }
    vars(view).update(ours)
    return view


def _make_torch_view(cuda: View) -> View:
    view = View(torch)
    vars(view).update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}, cuda=cuda)
    return view


cuda_view = _make_cuda_view()
"""``torch.cuda`` as megatron.core sees it; ``rng`` adds its functions."""
torch_view = _make_torch_view(cuda_view)
"""``torch`` as megatron.core sees it."""
