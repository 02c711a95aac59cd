"""``megatron-rl``, and ``python -m megatron_rl.commands``: the verbs of ``cli``, whose imports take a while already."""

from megatron_rl.process.path import leave_current_folder


def main() -> None:
    """Run the console command; this does not return."""
    from megatron_rl.process import lifetime

    lifetime.run(_run)


def _run() -> int:
    from megatron_rl.commands.cli import app
    from megatron_rl.commands.verbs import run_verb

    return run_verb(app)


if __name__ == "__main__":
    leave_current_folder()
    main()
