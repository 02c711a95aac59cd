"""Look into pools of stored samples, check them, put them together: python tools/sample_pool.py COMMAND ..."""

from megatron_rl.commands.pool import main

if __name__ == "__main__":
    main()
