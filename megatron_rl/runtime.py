"""What surrounds a rank's work: its threads, its process group, its log file, and how it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_rl.patches
from megatron_rl.config import Config
from megatron_rl.errors import UserError


@dataclass(frozen=True)
class Runtime:
    """This rank among the others."""

    rank: int
    world_size: int
    device: torch.device


def run_rank(config: Config, work: Callable[[Runtime], None]) -> int:
    """Set a rank up, do its work, and end it cleanly: one message for the user, a status, nothing left behind.

    A ``UserError`` is raised by all ranks alike; rank 0 prints it. Anything else is a defect: its traceback goes to the
    rank's log (rank 0: the console), and the launcher ends the other ranks.

    Args:
        config: of the run.
        work: what the rank is for; called with the process group in place.

    Returns:
        Exit status: 0, or 2 for something that the user can fix.
    """
    _die_with_parent()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        _log_to_file(config.exp_manager.run_dir / "logs" / f"rank_{rank}.log")
    try:
        _check_world_size(config, world_size)
        runtime = Runtime(rank, world_size, _device(config))
        if runtime.device.type == "cpu":
            torch.set_num_threads(threads_per_rank(config))
        for package in ("megatron", "torch"):  # what they lack or deprecate is not news to our users
            warnings.filterwarnings("ignore", module=package)
        megatron_rl.patches.apply()
        if not dist.is_initialized():  # a test may bring ranks of its own
            _join_others(config, runtime)
        work(runtime)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        # Leave at once: the others may wait for this rank in a collective, and torch's own clean-up would wait for them.
        os._exit(1)
    dist.destroy_process_group()
    return 0


def _join_others(config: Config, runtime: Runtime) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if runtime.device.type == "cuda" else "gloo",
        rank=runtime.rank,
        world_size=runtime.world_size,
        timeout=timedelta(seconds=config.trainer.timeout_s),
    )


def threads_per_rank(config: Config) -> int:
    """CPU threads of one rank: as configured, else an equal share of this machine's cores."""
    return config.trainer.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // config.trainer.devices)


def _device(config: Config) -> torch.device:
    wanted = config.trainer.accelerator
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator", wanted, "torch sees no GPU here", "use cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _check_world_size(config: Config, world_size: int) -> None:
    if world_size != config.trainer.world_size:
        raise UserError(
            "trainer.devices",
            config.trainer.devices,
            f"devices * num_nodes = {config.trainer.world_size}, but torchrun started {world_size} processes",
            "start with megatron-rl train, or make --nproc-per-node and --nnodes agree with the config",
        )


def _log_to_file(path: Path) -> None:
    """Send this process's output, that of libraries included, to a file; the console belongs to rank 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _die_with_parent() -> None:
    """A rank whose launcher is killed outright is killed too (Linux), so that no orphan trains on."""
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
