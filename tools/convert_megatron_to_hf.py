"""The verb ``megatron-rl convert export`` as a script (docs/convert.md)."""

from megatron_rl.commands.convert import convert_megatron_to_hf, run

if __name__ == "__main__":
    run(convert_megatron_to_hf)
