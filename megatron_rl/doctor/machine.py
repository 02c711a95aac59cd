"""Report what this machine will use: layers, optimizer, FP8 recipes; and why not something else."""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.util import find_spec
from typing import get_args

from megatron_rl.errors import UserError

_PACKAGES = {
    "torch": "torch", "megatron-core": "megatron-core", "transformer-engine": "transformer-engine", "sglang": "sglang",
    "transformers": "transformers", "torch-memory-saver": "torch_memory_saver",
}  # fmt: skip


def look() -> dict[str, str]:
    """Return a line for each subject."""
    import torch

    import megatron_rl.patches

    found = {"python": sys.version.split()[0]}
    found |= {name: _version(package) for name, package in _PACKAGES.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        count = torch.cuda.device_count()
        found["device"] = (
            f"{count} x {torch.cuda.get_device_name(0)}, {memory:.0f} GB, compute capability {major}.{minor}"
        )
    else:
        found["device"] = "CPU"
    megatron_rl.patches.apply(device.type)
    return found | _choices(device)


def _choices(device) -> dict[str, str]:  # type: ignore[no-untyped-def]
    from megatron_rl.model.fp8 import recipe
    from megatron_rl.model.specs import adam_in_use, has_transformer_engine

    is_engine = device.type == "cuda" and has_transformer_engine()
    local = "only with policy.megatron_cfg.transformer_impl=local: " if device.type == "cuda" else ""
    choices = {
        "layers": "Transformer Engine's" if is_engine else f"{local}Megatron's local ones",
        "attention": "Transformer Engine's" if is_engine else f"{local}our own, in plain torch",
        "adam": adam_in_use(),
        "apex": "installed" if find_spec("amp_C") is not None else "not installed",
    }
    for kind in get_args(recipe.RecipeName):
        choices[f"fp8 {kind}"] = "emulated" if device.type == "cpu" else _verdict(recipe, kind, device)
    return choices


def _verdict(recipe, kind: str, device) -> str:  # type: ignore[no-untyped-def]
    try:
        recipe.check_here(kind, device)
    except UserError as error:
        return str(error).partition(": ")[2]
    return "yes"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def print_machine() -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for subject, line in look().items():
        table.add_row(subject, line)
    Console().print(table)
