"""From the command line of one rank to its work; without torch until the config is found to be right."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_rl.config import Config, check_files, load_config
from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.launch.rank import Runtime


def run_program(
    name: str,
    work: Callable[[Config, Runtime], None],
    argv: Sequence[str] | None = None,
    *,
    adapt: Callable[[Config], Config] = lambda config: config,
) -> int:
    """One rank: read the config, load torch, meet the other ranks, work.

    Args:
        name: of the program, as in ``python -m name --config FILE [section.field=value ...]``.
        work: what the rank is for.
        argv: None takes the command line.
        adapt: what the program makes of the user's config.

    Returns:
        Exit status: 0 done, 2 something the user can fix.
    """
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args(argv)
    try:
        config = adapt(load_config(arguments.config, arguments.overrides))
        check_files(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from megatron_rl.launch.rank import run_rank

    return run_rank(config, lambda runtime: work(config, runtime))
