"""All checks and benchmarks that this machine's GPU can run, one after the other, each with a limit: ``make test-gpu``.

    python benchmarks/gpu/run.py [--minutes 9.5] [--only NAME ...]

Writes benchmarks/results/<gpu>-<date>.json as it goes: what ran and its figures, what was skipped and why. Packages must be
there; nothing is fetched.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BIG_HEAD = ("benchmarks/log_probs.py", "--hidden", "5120", "--vocabulary", "152064", "--tokens", "16384")
JOBS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    # name: (limit in seconds, packages needed, command)
    "agreement": (120, ("transformer_engine_torch",), ("benchmarks/gpu/agreement.py",)),
    "log_probs": (150, (), BIG_HEAD),
    "train_step": (240, ("transformer_engine_torch",), ("benchmarks/gpu/train_step.py",)),
    "vs_trl": (
        300,
        ("trl",),
        ("benchmarks/vs_trl.py", "--gpu", "--repeats", "1", "--steps", "8", "--trl-python", sys.executable),
    ),
}
PACKAGES = ("torch", "megatron-core", "transformer-engine", "liger-kernel", "cut-cross-entropy", "trl", "triton")


def main() -> int:
    """Status 1 if anything that ran has failed."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU.")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    parser.add_argument("--only", nargs="*", choices=JOBS, default=list(JOBS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    report: dict[str, Any] = {"machine": machine(), "date": str(datetime.date.today()), "ran": {}, "skipped": {}}
    name = report["machine"]["gpu"].lower().replace(" ", "_")
    path = arguments.results / f"{name}-{report['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for job in arguments.only:
        limit, needed, command = JOBS[job]
        left = deadline - time.monotonic()
        missing = [package for package in needed if find_spec(package) is None]
        if missing or left < 20:
            report["skipped"][job] = f"needs {', '.join(missing)}" if missing else "no time left"
        else:
            report["ran"][job] = run(command, min(limit, left))
        print(job, json.dumps(report["ran"].get(job, report["skipped"].get(job))), flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")  # after each, so that nothing is lost
    print(path)
    return int(any("failed" in found for found in report["ran"].values()))


def run(command: tuple[str, ...], limit_s: float) -> dict[str, Any]:
    """The JSON that a command prints last, and the seconds it took."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, check=False, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired as error:
        return {"failed": f"not done after {limit_s:.0f} s", "output": str(error.stdout)[-1000:]}
    seconds = round(time.monotonic() - started, 1)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        found = {}
    failed = {"failed": done.stderr[-1500:]} if done.returncode else {}
    return {"seconds": seconds, **failed, **found}


def machine() -> dict[str, Any]:
    """What it was measured on."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
