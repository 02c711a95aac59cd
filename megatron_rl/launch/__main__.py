"""``python -m megatron_rl.launch <torchrun arguments>``, the command of ``launcher``."""

from megatron_rl.process.lifetime import run
from megatron_rl.process.lock import inherited_lock


def _launch() -> int:
    from megatron_rl.launch.launcher import main

    with inherited_lock():
        return main()


if __name__ == "__main__":
    run(_launch)
