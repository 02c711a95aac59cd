"""``megatron-rl``, and ``python -m megatron_rl.commands``: the verbs of ``cli``, whose imports take a while already."""

from __future__ import annotations

from typing import NoReturn

from megatron_rl.process import lifetime


def main() -> NoReturn:
    """Run the console command."""
    lifetime.run(_run)


def _run() -> int:
    from megatron_rl.commands.cli import app
    from megatron_rl.commands.verbs import run_verb

    return run_verb(app)


if __name__ == "__main__":
    main()
