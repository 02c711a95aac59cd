"""``python -m megatron_rl.launch <torchrun arguments>``, the command of ``launcher``."""

from megatron_rl.launch.launcher import main
from megatron_rl.process.lifetime import leave
from megatron_rl.process.lock import inherited_lock

if __name__ == "__main__":
    with inherited_lock():
        status = main()
    leave(status)
