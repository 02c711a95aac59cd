"""The verb ``megatron-rl convert verify`` as a script (docs/convert.md)."""

from megatron_rl.commands.convert import run, verify_checkpoint

if __name__ == "__main__":
    run(verify_checkpoint)
