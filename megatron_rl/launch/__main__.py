"""``python -m megatron_rl.launch <torchrun arguments>``, the command of ``launcher``."""

from megatron_rl.process.path import leave_current_folder


def _launch() -> int:
    from megatron_rl.launch.launcher import main
    from megatron_rl.process.lock import inherited_lock

    with inherited_lock():
        return main()


if __name__ == "__main__":
    leave_current_folder()
    from megatron_rl.process.lifetime import run

    run(_launch)
