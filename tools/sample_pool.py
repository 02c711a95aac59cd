"""The verbs ``megatron-rl pool ...`` as a script (docs/stored_samples.md)."""

from megatron_rl.commands.pool import main

if __name__ == "__main__":
    main()
