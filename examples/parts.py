"""Long examples in parts: each is one command, done when its last file exists, so that a second start goes on.

Examples are modules, started in the folder that holds ``examples/``: ``python -m examples.segments.run``. Python then finds
this file and the examples' own tasks by their plain names, in this process and in every process that a part starts. The same
holds in a copy: copy this file and the example's folder, keep their names, and all commands work there. (An example that is
run as a script, by its path, would have to change ``sys.path`` first, and no config could name its task.)
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.files import write_atomic
from megatron_rl.process.lifetime import INTERRUPTED, PARENT_VARIABLE

EXAMPLES = Path("examples")
PROBLEMS = "--num-warm-start 32000 --num-train 2000 --slip-share 0.3 --forgotten-carry-share 0.6"
"""Problems with the quickstart's kind of mistakes in their demonstrations; fewer of them to practise on."""


@dataclass(frozen=True)
class Part:
    """One command. All paths are relative to the folder that holds ``examples/``."""

    name: str
    command: Sequence[str]
    last_file: Path
    """The file that the part writes last, all at once: ``summary.json`` of a run."""


def seconds_of(part: Part) -> float:
    """Run a part that is not done yet; leave the program if it fails.

    Returns:
        The seconds that the part took, over all starts but those that were killed.
    """
    path = part.last_file.parent / f".seconds_of_{part.name.replace(' ', '_')}"
    before = float(path.read_text()) if path.exists() else 0.0
    if part.last_file.exists():
        print(f"== {part.name}: {part.last_file} is there already", flush=True)
        return before
    print(f"== {part.name}", flush=True)
    started = time.monotonic()
    status = _status_of(part.command)
    total = round(before + time.monotonic() - started, 1)
    write_atomic(path, str(total))
    if status:
        sys.exit(status)
    return total


def _status_of(command: Sequence[str]) -> int:
    """Run a command; it ends with this process. After Ctrl-C, which it hears itself, wait for its own end."""
    with subprocess.Popen(command, env={**os.environ, PARENT_VARIABLE: str(os.getpid())}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.terminate()
            return INTERRUPTED


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``results.json`` in a folder."""
    write_atomic(folder / "results.json", json.dumps(report, indent=1) + "\n")


def verb(name: str, config: Path, *overrides: str) -> list[str]:
    """Return ``megatron-rl name config ...`` as a command."""
    return [sys.executable, "-P", "-m", "megatron_rl.commands", name, str(config), *overrides]


def start(folder: Path, seed: int, *, num_held_out: int = 300) -> tuple[dict[str, float], tuple[str, ...]]:
    """Make problems of a seed in ``folder``/data, and the quickstart's model after its warm start in ``folder``/warm_start.

    Returns:
        Seconds of both parts, and the overrides that runs from there have in common.
    """
    common = (f"exp_manager.exp_dir={folder}", f"trainer.seed={seed}")
    sizes = [*PROBLEMS.split(), "--num-held-out", str(num_held_out), "--seed", str(seed)]
    make = [sys.executable, "tools/make_word_problems.py", f"{folder}/data", *sizes]
    warm = (f"policy.model_path={folder}/data/model", f"data.train={folder}/data/warm_start.jsonl")
    train = verb("train", EXAMPLES / "quickstart" / "warm_start.yaml", *common, *warm)
    parts = (
        Part("problems", make, folder / "data" / "model" / "config.json"),
        Part("warm start", train, folder / "warm_start" / "summary.json"),
    )
    return {part.name: seconds_of(part) for part in parts}, common
