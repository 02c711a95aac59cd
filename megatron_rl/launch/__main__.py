"""``python -m megatron_rl.launch <torchrun arguments>``: see ``launcher``."""

from __future__ import annotations

import os
import sys

from megatron_rl.launch.launcher import main

if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread of torch's store that is still there makes an orderly end abort, now and then
