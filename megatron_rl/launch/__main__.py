"""``python -m megatron_rl.launch <torchrun arguments>``, the command of ``launcher``."""

from megatron_rl.launch.launcher import main
from megatron_rl.process.lifetime import leave

if __name__ == "__main__":
    leave(main())
