"""Digests of a checkpoint against its manifest, or of two against each other. See docs/convert.md."""

from megatron_rl.commands.convert import run, verify_checkpoint

if __name__ == "__main__":
    run(verify_checkpoint)
