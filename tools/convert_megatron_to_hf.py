"""The verb ``megatron-rl convert export`` as a script (docs/convert.md)."""

from megatron_rl.commands.convert import convert_megatron_to_hf
from megatron_rl.commands.verbs import run_script

if __name__ == "__main__":
    run_script(convert_megatron_to_hf)
