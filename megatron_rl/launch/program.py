"""The way from one rank's command line to its work, without torch until the config is checked."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_rl.config import Config, check_files, load_config
from megatron_rl.errors import UserError
from megatron_rl.process.lock import FolderLock, is_held_by_parent, take_lock

if TYPE_CHECKING:
    from megatron_rl.launch.rank import Runtime


def run_program(
    name: str,
    work: Callable[[Config, Runtime], None],
    argv: Sequence[str] | None = None,
    *,
    adapt: Callable[[Config], Config] = lambda config: config,
    is_trained: bool = True,
) -> int:
    """Run one rank: read the config, load torch, meet the other ranks, work.

    Args:
        name: name of the program, as in ``python -m name --config FILE [section.field=value ...]``.
        work: the rank's work.
        argv: None takes the command line.
        adapt: changes the user's config for this program.
        is_trained: False for a program that needs no problems to train on.

    Returns:
        Exit status: 0 done, 2 something the user can fix.
    """
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args(argv)
    try:
        config = adapt(load_config(arguments.config, arguments.overrides))
        check_files(config, is_trained=is_trained)
        lock = _take_folder(config)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine: its other ranks read the same files
            print(f"error: {error}", file=sys.stderr)
        return 2

    from megatron_rl.launch.rank import run_rank

    try:
        return run_rank(config, lambda runtime: work(config, runtime))
    finally:
        if lock is not None:
            lock.release()


def _take_folder(config: Config) -> FolderLock | None:
    """Take the run's folder for this node, unless the launcher did so for us; None on all but the first rank of a node.

    torchrun tells a rank its node. Another starter may not: then rank 0 alone takes the folder.
    """
    folder, rank = config.exp_manager.run_dir, int(os.environ.get("RANK", 0))
    node_rank = int(os.environ.get("GROUP_RANK", 0))
    is_first = rank == 0 or (node_rank > 0 and os.environ.get("LOCAL_RANK") == "0")
    if not is_first or is_held_by_parent(folder, node_rank):
        return None
    return take_lock(folder, node_rank)
