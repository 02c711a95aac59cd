"""Software of this environment: what is installed, and whether it fits together, the GPU and its driver.

Rules are functions of facts, so that they hold on machines that we do not have. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from megatron_rl.errors import UserError, described

BINDINGS = "transformer-engine-torch"
"""Package of Transformer Engine's torch bindings. Their library lies in ``transformer_engine``, so no module has their name."""
REBUILD = "make clean, then make sglang PLATFORM=gpu, which builds it against the torch that it installs"
_ENGINE_PARTS = ("transformer-engine", BINDINGS, "transformer-engine-cu12", "transformer-engine-cu13")
_DRIVERS = {12: "525", 13: "580"}
"""CUDA release -> first driver for it."""


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None where it is not installed. It is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine's torch bindings are installed (the meta package alone is not enough)."""
    return version_of(BINDINGS) is not None


def platform() -> str:
    """Makefile's PLATFORM for this machine: ``gpu`` where there is an NVIDIA GPU, else ``cpu``."""
    return "gpu" if Path("/dev/nvidia0").exists() else "cpu"


def driver_cuda() -> tuple[int, int] | None:
    """Ask the NVIDIA driver for the latest CUDA that it can run, as (major, minor); None without a driver."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def why_no_gpu(
    *, torch: str, cuda: str | None, driver: tuple[int, int] | None, has_device: bool
) -> tuple[str, str] | None:
    """Explain why torch sees no GPU.

    Args:
        torch: its version.
        cuda: the CUDA that it was built for, ``major.minor``; None for a build without.
        driver: latest CUDA of the driver; None where there is none.
        has_device: True where the machine has an NVIDIA GPU.

    Returns:
        Rule and fix of a ``UserError``; None where nothing here explains it.
    """
    if cuda is None:
        return (
            f"finds torch {torch}, a build without CUDA",
            "install one with it: make clean, then make sglang PLATFORM=gpu",
        )
    major = int(cuda.split(".")[0])
    if driver is not None and driver[0] < major:
        least = f" ({_DRIVERS[major]} or later)" if major in _DRIVERS else ""
        return (
            f"finds a driver for CUDA {driver[0]}.{driver[1]}, and torch {torch} was built for CUDA {cuda}",
            f"update the driver{least}",
        )
    if driver is None and has_device:
        return (
            "finds a GPU and no driver library (libcuda.so.1)",
            "install the driver; in a container, start it with the GPUs (docker run --gpus all)",
        )
    return None


def check_kernels(*, torch: str, capability: tuple[int, int], built_for: Sequence[str]) -> None:
    """Check that torch has kernels for a GPU.

    Args:
        torch: its version.
        capability: of the GPU, as (major, minor).
        built_for: ``torch.cuda.get_arch_list()``: ``sm_90`` runs on 9.0 and later of that major number, ``compute_120`` on
            12.0 and all later.

    Raises:
        UserError: the first kernel would end with "no kernel image is available".
    """
    found = [match.groups() for name in built_for if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name))]
    numbers = [(kind, (int(major), int(minor))) for kind, major, minor in found]
    for kind, number in numbers:
        if number <= capability and (kind == "compute" or number[0] == capability[0]):
            return
    have = ", ".join(f"{major}.{minor}" for major, minor in sorted({number for _, number in numbers})) or "none"
    raise UserError(
        "trainer.accelerator",
        "gpu",
        f"this GPU has compute capability {capability[0]}.{capability[1]}, and torch {torch} has kernels for {have}",
        "use another GPU, or a torch that was built for this one",
    )


def check_transformer_engine(
    *, torch: str, cuda: str, versions: Mapping[str, str | None], requirements: Sequence[str]
) -> None:
    """Check that the parts of Transformer Engine are of one release and one CUDA, that of torch.

    Args:
        torch: its version.
        cuda: the CUDA that it was built for, ``major.minor``.
        versions: of ``transformer-engine``, its bindings, and its cores ``transformer-engine-cu12`` and ``-cu13``; None for
            what is not installed.
        requirements: of the bindings, as their metadata has them: they name the core of the CUDA that they were built for.

    Raises:
        UserError: naming the parts that do not fit.
    """
    bindings, major = versions[BINDINGS], int(cuda.split(".")[0])
    if bindings is None:
        return
    problem, core = None, f"transformer-engine-cu{major}"
    built_for = re.search(r"transformer[-_]engine[-_]cu(\d+)", " ".join(requirements))
    others = [name for name, version in versions.items() if "-cu" in name and name != core and version is not None]
    if built_for is not None and int(built_for[1]) != major:
        problem = f"was built for CUDA {built_for[1]}, and torch {torch} for CUDA {cuda}"
    elif others:
        problem = (
            f"finds {others[0]} as well, whose files lie where those of {core} do, and torch {torch} is for CUDA {cuda}"
        )
    else:
        for name in (core, "transformer-engine"):
            if versions[name] != bindings:
                problem = f"has version {bindings}, and {name} {versions[name] or 'is not installed'}"
    if problem is not None:
        raise UserError(BINDINGS, None, problem, REBUILD)


def check_engine_here(*, torch: str, cuda: str) -> None:
    """``check_transformer_engine`` of this environment, and an import: Megatron would take its failure for an absence.

    Args:
        torch: its version.
        cuda: the CUDA that it was built for.

    Raises:
        UserError: Transformer Engine is installed, and does not fit this torch or cannot be imported.
    """
    if not has_transformer_engine():
        return
    versions = {name: version_of(name) for name in _ENGINE_PARTS}
    check_transformer_engine(torch=torch, cuda=cuda, versions=versions, requirements=metadata.requires(BINDINGS) or [])
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # from a linker, a missing file, its own checks
        raise not_importable("transformer_engine.pytorch", error, torch) from error


def check_pins(package: str, *, requirements: Sequence[str], versions: Mapping[str, str | None]) -> None:
    """Check that what a package asks for in one version alone is installed in that version.

    Args:
        package: its name.
        requirements: its own, as its metadata have them.
        versions: installed ones, of the packages to look at.

    Raises:
        UserError: one has another version, which pip would have told at the installation.
    """
    for requirement in requirements:
        pin = re.fullmatch(r"([\w-]+)==([\w.]+)", requirement)
        found = versions.get(pin[1]) if pin else None
        if pin and found is not None and found.split("+")[0] != pin[2]:
            rule = f"is made for {pin[1]} {pin[2]}, and {found} is installed here, for trainer and servers alike"
            raise UserError(
                package, version_of(package), rule, "make sglang PLATFORM=gpu, which installs what goes together"
            )


def check_server_here() -> None:
    """``check_pins`` of SGLang, for torch and transformers. On a CPU other versions than its own are known to work."""
    if version_of("sglang") is not None:
        versions = {name: version_of(name) for name in ("torch", "transformers")}
        check_pins("sglang", requirements=metadata.requires("sglang") or [], versions=versions)


def not_importable(module: str, error: Exception, torch: str) -> UserError:
    """Say why a compiled package does not import, and what to do.

    Args:
        module: its name.
        error: what the import raised.
        torch: version of the torch at hand.
    """
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        rule, fix = f"needs {error.name}, which is not installed", "make sglang PLATFORM=gpu"
    elif "undefined symbol" in text:
        rule, fix = f"was built against another torch than {torch} ({described(error)})", REBUILD
    elif "cannot open shared object file" in text:
        rule, fix = f"misses a library ({described(error)})", REBUILD
    else:
        rule, fix = f"cannot be imported ({described(error)})", REBUILD
    return UserError(module, None, rule, fix)
