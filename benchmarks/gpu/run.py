"""All checks and benchmarks that this machine's GPU can run, one after the other, each with a limit: ``make test-gpu``.

    python benchmarks/gpu/run.py [--minutes 9.5] [--only NAME ...]

Writes benchmarks/results/<gpu>-<date>.json as it goes: what ran and its figures, what was skipped and why, and which aims are
met. A file of the same day is added to. Packages must be there; nothing is fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import last_json

from megatron_rl.config.installed import version_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BIG_HEAD = ("benchmarks/log_probs.py", "--hidden", "5120", "--vocabulary", "152064", "--tokens", "16384")
VS_TRL = ("benchmarks/vs_trl.py", "--gpu", "--repeats", "1", "--steps", "3", "--trl-python", sys.executable)
JOBS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    # name: (seconds that are kept for it, packages needed, command); what matters most comes first
    "agreement": (90, (), ("benchmarks/gpu/agreement.py",)),
    "train_step": (190, ("transformer-engine-torch",), ("benchmarks/gpu/train_step.py",)),
    "log_probs": (120, (), BIG_HEAD),
    "vs_trl": (160, ("trl",), VS_TRL),
}
AIMS = {
    # name: (job, figure, at least or at most, aim)
    "local and Transformer Engine's log-probs, mean difference": ("agreement", "te_log_prob_abs_diff", "<=", 2e-3),
    "fused log-probs, share of the matmul rate": ("log_probs", "matmul_share", ">=", 0.70),
    "train step in bf16, share of the matmul rate": ("train_step", "mfu_bf16", ">=", 0.50),
    "train step in FP8, over bf16": ("train_step", "fp8_over_bf16", ">=", 1.3),
}
PACKAGES = ("torch", "megatron-core", "transformer-engine-torch", "liger-kernel", "cut-cross-entropy", "trl", "triton")


def main() -> int:
    """Status 1 if anything that ran has failed."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU.")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    date = str(datetime.date.today())
    path = arguments.results / f"{torch.cuda.get_device_name(0).lower().replace(' ', '_')}-{date}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that ``run`` ends its job
    failed = False
    for index, job in enumerate(arguments.only):
        kept, needed, command = JOBS[job]
        left = deadline - time.monotonic()
        # What earlier jobs have not used goes to this one; the seconds of later ones do not.
        limit = max(min(kept, left), left - sum(JOBS[later][0] for later in arguments.only[index + 1 :]))
        missing = [package for package in needed if version_of(package) is None]
        if missing or limit < 20:
            found = {"skipped": f"needs {', '.join(missing)}" if missing else "no time left"}
        else:
            found = run(command, limit)
        failed |= "failed" in found
        print(job, json.dumps(found), flush=True)
        report = merge(path, {"machine": machine(), "date": date}, job, found)  # after each, so that nothing is lost
    print_aims(report["aims"])
    print(path)
    return int(failed)


def run(command: tuple[str, ...], limit_s: float) -> dict[str, Any]:
    """The last JSON that a command has printed, and the seconds it took; ``failed`` says why it did not end well.

    The command gets a session of its own, which ends as a whole: a grandchild that lives on would keep its GPU memory.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=output, stderr=errors, start_new_session=True
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=limit_s)
        finally:  # when this program is interrupted, too
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
        printed, complained = (file.seek(0) or file.read() for file in (output, errors))
    found = {"seconds": round(time.monotonic() - started, 1), **(last_json(printed) or {})}
    if status is None:
        found |= {"failed": f"not done after {limit_s:.0f} s", "output": complained[-1000:]}
    elif status:
        found.setdefault("failed", f"status {status}: {complained[-1500:]}")
    return found


def merge(path: Path, header: dict[str, Any], job: str, found: dict[str, Any]) -> dict[str, Any]:
    """Add what was found of one job to the file of the day, and judge the aims anew. Returns what the file holds.

    A job that is skipped now leaves what an earlier call has measured.
    """
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else header | {"ran": {}, "skipped": {}}
    if "skipped" in found:
        report["skipped"][job] = found["skipped"]
    else:
        report["skipped"].pop(job, None)
        report["ran"][job] = found
    report |= header | {"aims": judge(report["ran"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def judge(ran: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each aim: its value, what it should be, and whether it is; None where it was not measured."""
    aims = {}
    for name, (job, figure, sense, aim) in AIMS.items():
        value = ran.get(job, {}).get(figure)
        met = None if value is None else (value >= aim if sense == ">=" else value <= aim)
        aims[name] = {"value": value, "aim": f"{sense} {aim}", "met": met}
    return aims


def print_aims(aims: dict[str, dict[str, Any]]) -> None:
    """A line for each."""
    for name, aim in aims.items():
        value = "-" if aim["value"] is None else f"{aim['value']:.4f}"
        said = {None: "not measured", True: "met", False: "missed"}[aim["met"]]
        print(f"{name:60}{value:>8}  aim {aim['aim']}  {said}")


def machine() -> dict[str, Any]:
    """What it was measured on."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": {package: version_of(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    sys.exit(main())
