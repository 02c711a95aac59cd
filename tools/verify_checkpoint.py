"""The verb ``megatron-rl convert verify`` as a script (docs/convert.md)."""

from megatron_rl.commands.convert import verify_checkpoint
from megatron_rl.commands.verbs import run_script

if __name__ == "__main__":
    run_script(verify_checkpoint)
