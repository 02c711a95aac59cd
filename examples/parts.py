"""Long examples in parts: each is one command, done when its result exists, so that a second start goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
PROBLEMS = "--num-warm-start 32000 --num-train 2000 --slip-share 0.3 --forgotten-carry-share 0.6"
"""The quickstart's kind of mistakes, fewer problems to practise on."""


@dataclass(frozen=True)
class Part:
    """One command."""

    name: str
    command: Sequence[str]
    """Run in the repository's folder."""
    result: Path
    """What exists once it is done, relative to the repository."""


def seconds_of(part: Part) -> float:
    """Run a part that is not done yet; the seconds that it took, over all interruptions. Leaves the program if it fails."""
    path = ROOT / part.result.parent / f".seconds_of_{part.name.replace(' ', '_')}"
    before = float(path.read_text()) if path.exists() else 0.0
    if (ROOT / part.result).exists():
        print(f"== {part.name}: {part.result} is there already", flush=True)
        return before
    print(f"== {part.name}", flush=True)
    started = time.monotonic()
    status = subprocess.run(part.command, cwd=ROOT, check=False).returncode
    total = round(before + time.monotonic() - started, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(total))
    if status:
        sys.exit(status)
    return total


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, whose folder is relative to the repository."""
    return [json.loads(line) for line in (ROOT / run / "metrics.jsonl").read_text().splitlines()]


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """``results.json`` in a folder that is relative to the repository."""
    (ROOT / folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")


def verb(name: str, config: Path, *overrides: str) -> list[str]:
    """``megatron-rl name config ...`` as a command."""
    return [sys.executable, "-m", "megatron_rl.commands.cli", name, str(config.relative_to(ROOT)), *overrides]


def start(folder: Path, seed: int, *, num_held_out: int = 300) -> tuple[dict[str, float], tuple[str, ...]]:
    """Problems of a seed in ``folder``/data, and the quickstart's model after its warm start in ``folder``/warm_start.

    Returns:
        Seconds of both parts, and the overrides that runs from there have in common.
    """
    common = (f"exp_manager.exp_dir={folder}", f"trainer.seed={seed}")
    sizes = [*PROBLEMS.split(), "--num-held-out", str(num_held_out), "--seed", str(seed)]
    warm = (f"policy.model_path={folder}/data/model", f"data.train={folder}/data/warm_start.jsonl")
    parts = (
        Part(
            "problems",
            [sys.executable, "tools/make_word_problems.py", f"{folder}/data", *sizes],
            folder / "data" / "model",
        ),
        Part("warm start", verb("train", QUICKSTART / "warm_start.yaml", *common, *warm), folder / "warm_start" / "hf"),
    )
    return {part.name: seconds_of(part) for part in parts}, common
