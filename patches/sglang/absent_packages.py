"""Stand-ins for GPU packages that SGLang imports at module level and, on CPU, never calls.

Why: ``import sglang.srt.server_args`` fails without triton, torchvision and sgl_kernel; none of them is of use on a CPU,
    and two of them have no CPU wheel that fits.
Upstream: module-level imports such as ``sglang.srt.layers.attention.triton_ops``, ``sglang.srt.layers.moe.topk``.
Versions: 0.5.23 - 0.5.23
Remove when: SGLang's wheel imports on CPU without these packages, or publishes a CPU wheel.
Tested by: tests/unit/patches/test_patch_absent_packages.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

ABSENT = ("triton", "torchvision", "sgl_kernel")


def apply() -> list[str]:
    """Install the finder for those of ``ABSENT`` that are not installed; returns their names. Harmless when repeated."""
    names = [name for name in ABSENT if PathFinder.find_spec(name) is None]
    if names and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder(names))
    return names


class _Finder(MetaPathFinder, Loader):
    """Finds every module below the absent packages, however deep."""

    def __init__(self, names: list[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._names:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "triton":  # two helpers are called while modules load, to compute constants
            vars(module)["cdiv"] = lambda a, b: -(a // -b)
            vars(module)["next_power_of_2"] = lambda n: 1 << (n - 1).bit_length() if n > 0 else 1


class _StandIn(ModuleType):
    """A module with every attribute: classes for capitalised names, else modules that serve as decorators."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__path__, self.__file__ = spec, [], __file__
        self.__version__ = "0.0.0"
        self._loader = spec.loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name[:1].isupper():
            value = _AnyAttribute(name, (), {"__module__": self.__name__, "__init__": _ignore_arguments})
        else:
            full = f"{self.__name__}.{name}"
            value = sys.modules.get(full)
            if value is None:
                value = sys.modules[full] = _StandIn(ModuleSpec(full, self._loader, is_package=True))
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Serve as a decorator, with or without options; anything else than decorating is a call that must not be."""
        if self.__name__.partition(".")[0] != "triton":
            raise NotImplementedError(f"{self.__name__} is not installed; SGLang should not call it on a CPU")
        if len(args) == 1 and callable(args[0]) and not options:
            return args[0]
        return _undecorated

    def __bool__(self) -> bool:
        return False  # ``if has_x`` tests must see that it is not there

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _AnyAttribute(type):
    """A class whose every attribute is its own name: enumerations read at import, such as InterpolationMode.BICUBIC."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def _ignore_arguments(self: object, *args: object, **options: object) -> None:
    pass


def _undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
