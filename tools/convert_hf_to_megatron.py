"""The verb ``megatron-rl convert import`` as a script (docs/convert.md)."""

from megatron_rl.commands.convert import convert_hf_to_megatron, run

if __name__ == "__main__":
    run(convert_hf_to_megatron)
