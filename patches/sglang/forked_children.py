"""Fork the server's scheduler and detokenizer where there is no GPU, instead of spawning them.

Why: each spawned process imports torch and SGLang again, which takes longer than all the rest of a server's start. On a
    GPU they must be spawned, because CUDA does not survive a fork; on a CPU no thread may hold a lock by then. Ours that gives
    signs of life takes none.
Upstream: ``multiprocessing.set_start_method("spawn", force=True)`` in sglang/srt/entrypoints/engine.py
Versions: 0.5.23 - 0.5.23
Remove when: SGLang takes its start method from its caller.
Tested by: tests/servers/test_own_servers.py

A forked process does not import the main module: what each process of the server needs beside its memory is given to
``os.register_at_fork`` by rollout/sglang_server.py.
"""

from __future__ import annotations

import multiprocessing
from importlib.machinery import PathFinder
from pathlib import Path


def apply() -> None:
    """Let ``multiprocessing`` fork, whoever asks it to spawn.

    Raises:
        RuntimeError: SGLang does not set a method there any more, so this patch needs a look.
    """
    spec = PathFinder.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "srt/entrypoints/engine.py"
    if 'mp.set_start_method("spawn", force=True)' not in source.read_text():
        raise RuntimeError(
            f"{source} does not set the method to start processes: this patch of megatron_rl needs a look"
        )
    choose = multiprocessing.set_start_method
    if choose.__name__ == "fork_instead":
        return

    def fork_instead(method: str | None, force: bool = False) -> None:
        choose("fork" if method == "spawn" else method, force=force)

    multiprocessing.set_start_method = fork_instead
