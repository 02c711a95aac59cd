"""``python -m megatron_rl.launch <torchrun arguments>``: see ``launcher``."""

from __future__ import annotations

import sys

from megatron_rl.launch.launcher import main

if __name__ == "__main__":
    sys.exit(main())
