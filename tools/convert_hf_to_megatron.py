"""The verb ``megatron-rl convert import`` as a script (docs/convert.md)."""

from megatron_rl.commands.convert import convert_hf_to_megatron
from megatron_rl.commands.verbs import run_script

if __name__ == "__main__":
    run_script(convert_hf_to_megatron)
