"""The verbs ``megatron-rl pool ...`` as a script (docs/stored_samples.md)."""

from megatron_rl.commands.pool import app
from megatron_rl.commands.verbs import run_verb
from megatron_rl.process import lifetime

if __name__ == "__main__":
    lifetime.run(lambda: run_verb(app))
