"""From a checked config to running ranks: the torchrun command, and the small process that runs it.

``python -m megatron_rl.launch <torchrun arguments>`` is torchrun itself, less its traceback when a rank fails: the rank has
already said why.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from megatron_rl.config import Config

ALLOCATOR = {
    # glibc returns large blocks to the kernel at once, and touching them anew can be slow. What keeping them is worth
    # depends on the machine: benchmarks/results/cpu_step.md.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}


def torchrun_arguments(config: Config, config_path: str, overrides: Sequence[str]) -> list[str]:
    """Arguments of torchrun for one node (several nodes: examples/launch)."""
    return [
        "--standalone",
        f"--nproc-per-node={config.trainer.devices}",
        "-m",
        "megatron_rl.train",
        "--config",
        config_path,
        *overrides,
    ]


def start(config: Config, config_path: str, overrides: Sequence[str]) -> None:
    """Print the torchrun command and become it. Does not return."""
    arguments = torchrun_arguments(config, config_path, overrides)
    print(f"$ torchrun {shlex.join(arguments)}", flush=True)
    threads = config.trainer.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // config.trainer.devices)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **ALLOCATOR, **os.environ}
    command = [sys.executable, "-m", "megatron_rl.launch", *arguments]
    os.execve(sys.executable, command, environment)


def main() -> int:
    """torchrun, with one line instead of a traceback when ranks fail."""
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != 2:  # 2 is a UserError, which rank 0 has printed
            print(
                f"error: rank {rank} ended with status {failure.exitcode}; see logs/ in the run's folder",
                file=sys.stderr,
            )
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
