"""Try the GPU environment on a machine without a GPU: ``make check-gpu-env``, or ``python -m tests.check_gpu_env`` in it.

It holds what is installed against requirements/gpu.lock, imports what trainer and servers import, and builds a Transformer
Engine model of each family on the CPU, whose parameters must be those of the weight table. Nothing is computed. Prints a
table; status 1 if a line of it is wrong.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
FAMILIES = ("qwen2", "qwen3", "llama", "qwen3_moe", "mixtral", "deepseek_v3")
WITH_EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3")
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name: (families, overrides). A kind of layer with other parameter names gets a line here.
    "": (FAMILIES, ()),
    "experts one by one": (WITH_EXPERTS, ("policy.megatron_cfg.moe_grouped_gemm=false",)),
    "router fusion": (("qwen3_moe", "mixtral"), ("policy.megatron_cfg.moe_router_fusion=true",)),
}
IMPORTS = {
    "trainer": (
        "transformer_engine.pytorch", "megatron.core", "megatron_rl.run", "megatron_rl.commands.cli",
        "megatron_rl.doctor.machine",
    ),
    # What megatron_rl/rollout/sglang_server.py imports, and what SGLang then imports in its processes.
    "server": (
        "uvicorn", "starlette.routing", "sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.server_args",
        "sglang.srt.utils", "sglang.srt.managers.detokenizer_manager", "megatron_rl.weight_sync.receiver",
    ),
    "scheduler": (
        "sglang.srt.managers.scheduler", "sglang.srt.model_executor.model_runner", "sglang.srt.models.llama",
        "sglang.srt.models.qwen2", "sglang.srt.models.qwen3", "sglang.srt.models.qwen3_moe", "sglang.srt.models.mixtral",
        "sglang.srt.models.deepseek_v2",
    ),
    # What SGLang imports only where it sees a GPU.
    "kernels": (
        "sgl_kernel", "sgl_kernel.flash_attn", "flash_attn.cute", "flashinfer", "deep_gemm", "xgrammar", "quack",
        "torch_memory_saver",
    ),
}  # fmt: skip
"""Process -> its imports."""


def main() -> int:
    """Print a line for each check; return 1 if one has failed."""
    failed = False
    for name, check in checks():
        started = time.monotonic()
        try:
            said, is_well = check(), True
        except Exception as error:  # the next check may say more
            said, is_well = f"{type(error).__name__}: {str(error)[:600]}", False
        failed |= not is_well
        seconds = time.monotonic() - started
        print(f"{'ok    ' if is_well else 'FAILED'} {name:32} {seconds:5.0f} s  {said}", flush=True)
    return int(failed)


def checks() -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and check, in order; a check returns what it has found, or raises."""
    yield "versions of gpu.lock", versions
    yield "requirements of each package", pip_check
    for process, modules in IMPORTS.items():
        yield f"imports: {process}", lambda modules=modules: imported(*modules)
    for variant, (families, overrides) in VARIANTS.items():
        for family in families:
            yield (
                f"{family} {variant}".strip(),
                lambda family=family, overrides=overrides: in_process(family, *overrides),
            )


def versions() -> str:
    """Every package of the lock is here in that version."""
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements/gpu.lock").read_text(), re.MULTILINE))
    wrong = []
    for name, version in locked.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != version:
            wrong.append(f"{name} {found}, not {version}")
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return f"{len(locked)} packages"


def pip_check() -> str:
    """No package lacks what it asks for."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("; ".join(done.stdout.splitlines()))
    return done.stdout.strip()


def imported(*modules: str) -> str:
    """Modules import, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = driver_stand_in(Path(folder)) if "sgl_kernel" in modules else None
        done = run("-c", "; ".join(f"import {module}" for module in modules), library_path=path)
    if done.returncode:
        raise RuntimeError("; ".join(line for line in done.stderr.splitlines()[-20:] if "Error" in line))
    return f"{len(modules)} modules" + (", with a stand-in for the driver's library" if path else "")


def driver_stand_in(folder: Path) -> Path:
    """Make a ``libcuda.so.1`` whose functions all fail, so that the linker resolves everything else of SGLang's kernels."""
    kernels = sorted(Path(sysconfig.get_path("purelib"), "sgl_kernel").rglob("*.so"))
    listed = subprocess.run(["nm", "-D", "--undefined-only", *kernels], check=True, capture_output=True, text=True)
    names = sorted(set(re.findall(r" (cu(?!da|blas)[A-Z]\w*)$", listed.stdout, re.MULTILINE)))
    (folder / "driver.c").write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names))
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(command, check=True, cwd=folder)
    return folder


def in_process(family: str, *overrides: str) -> str:
    """``build`` in a process of its own: Megatron keeps state."""
    done = run("-m", "tests.check_gpu_env", family, *overrides)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        raise RuntimeError(lines[-1])
    return done.stdout.strip().splitlines()[-1]


def run(*arguments: str, library_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python in the repository."""
    environment = os.environ | ({} if library_path is None else {"LD_LIBRARY_PATH": str(library_path)})
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)


def build(family: str, *overrides: str) -> str:
    """Build a Transformer Engine model of a family, compare its parameters with the weight table, and fill them.

    Raises:
        RuntimeError: a name that the table does not know, or one that the model does not have.
    """
    import torch
    import torch.distributed as dist

    import megatron_rl.patches

    torch.set_num_threads(1)
    megatron_rl.patches.apply("cpu")

    from megatron_rl.config import load_config, read_model_shape
    from megatron_rl.convert.hf.random_weights import RandomReader
    from megatron_rl.convert.tables.table import entries, plain_name
    from megatron_rl.errors import UserError
    from megatron_rl.model.build import build_chunks, build_groups_of
    from megatron_rl.model.weights import load_hf_weights, named_parameters
    from tests.tiny_models import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", family, tied=False, seed=1)  # type: ignore[arg-type]
        given = (
            f"policy.model_path={model}",
            "data.task=gsm8k",
            "data.train=x.jsonl",
            "trainer.devices=1",
            "rollout.max_new_tokens=64",
        )
        try:
            config = load_config(ROOT / "configs/grpo.yaml", [*given, *overrides])
        except UserError as error:
            if overrides and error.field in overrides[0]:
                return f"not offered: {error.field} {error.rule}"
            raise
        shape = read_model_shape(config)
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        groups = build_groups_of(config, torch.device("cpu"))
        with as_on_a_gpu():
            chunks = build_chunks(config, shape, groups)
        mine = {plain_name(name) for name in dict(named_parameters(chunks, shape, groups))}
        table = set(entries(shape))
        if mine != table:
            raise RuntimeError(f"not in the table: {sorted(mine - table)}; not in the model: {sorted(table - mine)}")
        load_hf_weights(chunks, shape, groups, lambda: RandomReader(shape, seed=1))
        theirs = {
            type(module).__name__
            for module in chunks[0].modules()
            if "transformer_engine" in ancestry(module) and type(module).__name__.startswith("TE")
        }
        if not theirs:
            raise RuntimeError("no layer is Transformer Engine's")
        return f"{len(mine)} names; {', '.join(sorted(theirs))}"


def ancestry(module: object) -> str:
    """Modules of a class and its bases."""
    return " ".join(base.__module__ for base in type(module).__mro__)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let Transformer Engine build its modules, for a Hopper that is not there."""
    import torch

    from megatron_rl.model import build

    with (
        mock.patch.object(build, "uses_transformer_engine", lambda *_: True),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
    ):
        yield


if __name__ == "__main__":
    if sys.argv[1:]:
        print(build(*sys.argv[1:]))
    else:
        sys.exit(main())
