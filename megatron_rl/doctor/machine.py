"""Report what this machine will use: layers, optimizer, FP8 recipes; and why not something else."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import get_args

from megatron_rl.config import installed
from megatron_rl.config.installed import has_transformer_engine, version_of
from megatron_rl.errors import UserError

_PACKAGES = ("torch", "megatron-core", installed.BINDINGS, "sglang", "transformers", "torch-memory-saver")


def look() -> dict[str, str]:
    """Return a line for each subject."""
    import torch

    import megatron_rl.patches

    found = {"python": sys.version.split()[0]}
    found |= {name: version_of(name) or "not installed" for name in _PACKAGES}
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
    found["gpu software"] = _fit(torch)
    megatron_rl.patches.apply(device.type)
    return found | _choices(device)


def _fit(torch) -> str:  # type: ignore[no-untyped-def]
    """Say whether driver, torch, Transformer Engine and SGLang go together, as a run checks at its start."""
    name, cuda = torch.__version__, torch.version.cuda
    if not torch.cuda.is_available():
        has_device, driver = installed.platform() == "gpu", installed.driver_cuda()
        why = installed.why_no_gpu(torch=name, cuda=cuda, driver=driver, has_device=has_device)
        return "; ".join(why) if has_device and why else "no GPU, so nothing to fit"
    try:
        installed.check_kernels(
            torch=name, capability=torch.cuda.get_device_capability(), built_for=torch.cuda.get_arch_list()
        )
        installed.check_engine_here(torch=name, cuda=cuda)
        installed.check_server_here()
    except UserError as error:
        return str(error)
    return "fits"


def _choices(device) -> dict[str, str]:  # type: ignore[no-untyped-def]
    from megatron_rl.model.fp8 import recipe
    from megatron_rl.model.specs import adam_in_use

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


def print_machine() -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for subject, line in look().items():
        table.add_row(subject, line)
    Console().print(table)
