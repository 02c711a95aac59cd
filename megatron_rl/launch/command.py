"""The torchrun command of this node, and becoming it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from megatron_rl.config import Config
from megatron_rl.launch.meeting import Meeting
from megatron_rl.process.lock import take_lock
from megatron_rl.process.output import LOG_VARIABLE
from megatron_rl.process.run_key import FILE, FILE_VARIABLE, draw_key, given_key, write_key
from megatron_rl.process.run_key import VARIABLE as KEY_VARIABLE

ALLOCATOR = {
    # glibc's own settings give pages back to the kernel and fetch them again all the time, which can be slow. With every block
    # kept, large and small ones cut each other's room to pieces, and the heap grows to several times what is in use. So
    # blocks are kept up to the largest limit that every glibc accepts, and larger ones are mapped:
    # docs/results/memory-over-time.md.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

GPU_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Torch's settings of its GPU allocator, under their new and their old name."""


def gpu_variables(config: Config, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for GPUs that ranks get unless the user has set them. On a CPU they have no effect.

    Args:
        config: of the run.
        given: the user's environment.
    """
    # Megatron counts on one hardware queue to overlap communication of tensor parallelism with products, up to Hopper.
    found = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    # Segments that grow leave few fragments under packs of many lengths. Colocated servers open the trainer's weights by CUDA
    # IPC, and of such a segment only by pidfd_getfd, which containers forbid (pytorch/pytorch#165685).
    if not config.rollout.is_colocated and not any(name in given for name in GPU_ALLOCATOR):
        found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return found


def torchrun_arguments(
    config: Config,
    config_path: str,
    overrides: Sequence[str],
    meeting: Meeting | None = None,
    *,
    program: str = "megatron_rl.train",
) -> list[str]:
    """Return the arguments of torchrun for this node.

    The meeting is static, not torchrun's elastic one: the node ranks that the user gives then decide the ranks, so that
    rank 0, with console, metrics and server addresses, is on the node of the user's choice. Nothing is restarted: a run
    goes on when the same command is given again.
    """
    trainer = config.trainer
    nodes = ["--standalone"]
    if meeting is not None:
        nodes = [
            f"--nnodes={trainer.num_nodes}",
            f"--node-rank={meeting.node_rank}",
            f"--master-addr={meeting.host}",
            f"--master-port={meeting.port}",
            f"--rdzv-conf=timeout={max(1, int(trainer.timeout_s))}",
        ]
    return [
        *nodes,
        "--max-restarts=0",
        f"--nproc-per-node={trainer.devices}",
        "-m",
        program,
        "--config",
        config_path,
        *overrides,
    ]


def start(
    config: Config,
    config_path: str,
    overrides: Sequence[str],
    meeting: Meeting | None = None,
    *,
    program: str = "megatron_rl.train",
) -> None:
    """Take this node's lock of the run's folder, print the torchrun command and become it. This does not return.

    Nodes other than 0 print the folder of their logs instead of the command.

    Raises:
        UserError: another start has the folder, or it cannot be written, or there is no way to have a key.
    """
    arguments = torchrun_arguments(config, config_path, overrides, meeting, program=program)
    node_rank, folder, key = 0 if meeting is None else meeting.node_rank, config.exp_manager.run_dir, given_key()
    logs = folder.resolve() / "logs"
    handed_on = take_lock(folder, node_rank).handed_on()
    if node_rank == 0:
        key = key or (draw_key() if meeting is None else write_key(folder))
        print(f"$ torchrun {shlex.join(arguments)}", flush=True)
    else:
        first = node_rank * config.trainer.devices
        ranks = f"rank_N.log, N from {first} to {first + config.trainer.devices - 1}"
        print(f"node {node_rank} of {config.trainer.num_nodes}: logs in {logs}/{ranks}", flush=True)
    handed_on |= {FILE_VARIABLE: str(folder.absolute() / FILE)} if key is None else {KEY_VARIABLE: key.hex()}
    environment = {
        "OMP_NUM_THREADS": str(config.trainer.num_threads),
        "TOKENIZERS_PARALLELISM": "false",
        **ALLOCATOR,
        **gpu_variables(config, os.environ),
        **os.environ,
        **handed_on,
        LOG_VARIABLE: str(logs / ("console.log" if meeting is None else f"console_{meeting.node_rank}.log")),
    }
    command = [sys.executable, "-P", "-m", "megatron_rl.launch", *arguments]
    os.execve(sys.executable, command, environment)
