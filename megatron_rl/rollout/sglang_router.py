"""``sglang-router`` as a child that ends with its parent: ``python -m megatron_rl.rollout.sglang_router <its flags>``."""

from __future__ import annotations

from megatron_rl.process.lifetime import die_with_starter

if __name__ == "__main__":
    die_with_starter()
    from sglang_router.launch_router import main

    main()
