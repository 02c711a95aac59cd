"""All that this machine's GPU can show, in eight minutes: ``make test-gpu``, or by itself on a machine that has only torch.

    python3 benchmarks/gpu/eight_minutes.py [--bundle build/gpu-bundle] [--minutes 8] [--only NAME ...] [--tiny]

What matters most comes first, and each part has a limit of its own: what was not used goes to the next. Writes
benchmarks/results/<gpu>-<date>.json as it goes: what ran and its figures, what was skipped and why, and which aims are met. A
file of the same day is added to. Nothing is fetched: packages are there, or in the folder that ``make gpu-bundle`` fills.
``--tiny`` runs every part on a CPU in small, which shows that the script works, and nothing else.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BIG_HEAD = ("--hidden", "5120", "--vocabulary", "152064", "--tokens", "16384")
SMALL_HEAD = ("--hidden", "64", "--vocabulary", "512", "--tokens", "64")
TRAIN_STEP = ("benchmarks/gpu/train_step.py",)
VS_TRL = ("benchmarks/vs_trl.py", "--repeats", "1", "--steps", "3")
TRANSFER = ("benchmarks/weight_sync.py", "--device", "cuda", "--layers", "24")
SMALL_TRANSFER = ("benchmarks/weight_sync.py", "--layers", "2", "--repeats", "1")


@dataclass(frozen=True)
class Part:
    """One measurement, a program that prints lines of JSON, each with all that it has found so far."""

    seconds: int
    """Kept for it."""
    command: tuple[str, ...]
    tiny: tuple[str, ...]
    """Command on a CPU, in small."""
    needs: tuple[str, ...] = ()
    """Packages."""
    num_gpus: int = 1


PARTS: dict[str, Part] = {
    "machine": Part(15, ("benchmarks/gpu/machine.py",), ("benchmarks/gpu/machine.py",)),
    "train_step": Part(
        70,
        ("benchmarks/gpu/train_step.py", "--recipes", "bf16"),
        ("benchmarks/gpu/train_step.py", "--tiny", "--recipes", "bf16"),
    ),
    "log_probs": Part(90, ("benchmarks/log_probs.py", *BIG_HEAD), ("benchmarks/log_probs.py", *SMALL_HEAD)),
    "head_bits": Part(15, ("benchmarks/gpu/head_bits.py",), ("benchmarks/gpu/head_bits.py", "--tiny")),
    "train_step_fp8": Part(
        80,
        (*TRAIN_STEP, "--recipes", "bf16", "tensorwise", "blockwise"),
        (*TRAIN_STEP, "--tiny", "--recipes", "bf16", "tensorwise"),
        ("transformer-engine-torch",),
    ),
    "vs_trl": Part(100, (*VS_TRL, "--gpu", "--trl-python", sys.executable), VS_TRL, ("trl",)),
    "agreement": Part(60, ("benchmarks/gpu/agreement.py",), ("benchmarks/gpu/agreement.py", "--tiny")),
    "transfer_memory": Part(25, (*TRANSFER, "--way", "memory"), (*SMALL_TRANSFER, "--way", "memory")),
    "transfer_network": Part(25, (*TRANSFER, "--way", "network"), (*SMALL_TRANSFER, "--way", "network"), num_gpus=6),
}
"""In the order of what they are worth."""
AIMS = {
    # name: (part, figure, at least or at most, aim)
    "local and Transformer Engine's log-probs, mean difference": ("agreement", "te_log_prob_abs_diff", "<=", 4e-3),
    "fused log-probs, share of the matmul rate": ("log_probs", "matmul_share", ">=", 0.90),
    "a log-prob's error, given the hidden states": ("head_bits", "log_prob_error_max", "<=", 1e-5),
    "train step in bf16, share of the matmul rate": ("train_step", "mfu_bf16", ">=", 0.50),
    "train step in FP8, over bf16": ("train_step_fp8", "fp8_over_bf16", ">=", 1.3),
    "GRPO's tokens per second, over TRL's": ("vs_trl", "tokens_per_s_ratio", ">=", 1.0),
    "weights through memory, over raw copies": ("transfer_memory", "throughput_vs_raw", ">=", 0.5),
    "weights through NCCL, over raw messages": ("transfer_network", "throughput_vs_raw", ">=", 0.7),
}
"""Last-bit noise of hidden states alone moves a log-prob by 1.8e-3 at a standard deviation of the logits of 0.9: the first aim
is twice that."""
PACKAGES = ("torch", "megatron-core", "transformer-engine-torch", "liger-kernel", "cut-cross-entropy", "trl", "triton")


def main() -> int:
    """Status 1 if anything that ran has failed."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--bundle", type=Path, help="folder of wheels, made by make gpu-bundle")
    parser.add_argument("--tiny", action="store_true", help="every part in small, on a CPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.bundle is not None:
        unpack(arguments.bundle.resolve())

    import torch

    if not (torch.cuda.is_available() or arguments.tiny):
        print("no GPU here: nothing was run")
        return 0
    from megatron_rl.config.installed import version_of

    date = str(datetime.date.today())
    path = arguments.results / f"{device_name().lower().replace(' ', '_')}-{date}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that ``run`` ends its part
    failed = False
    for index, name in enumerate(arguments.only):
        part, left = PARTS[name], deadline - time.monotonic()
        # What earlier parts have not used goes to this one; the seconds of later ones do not.
        limit = max(min(part.seconds, left), left - sum(PARTS[later].seconds for later in arguments.only[index + 1 :]))
        missing = [] if arguments.tiny and name != "vs_trl" else [p for p in part.needs if version_of(p) is None]
        if missing:
            found: dict[str, Any] = {"skipped": f"needs {', '.join(missing)}"}
        elif not arguments.tiny and torch.cuda.device_count() < part.num_gpus:
            found = {"skipped": f"needs {part.num_gpus} GPUs"}
        elif limit < 10:
            found = {"skipped": "no time left"}
        else:
            found = run(part.tiny if arguments.tiny else part.command, limit)
        failed |= "failed" in found
        print(name, json.dumps(found), flush=True)
        report = merge(path, {"machine": machine(), "date": date}, name, found)  # after each, so that nothing is lost
    print_aims(report["aims"])
    print(path)
    return int(failed)


def unpack(bundle: Path) -> None:
    """Install the wheels of a folder beside torch, for this process and those that it starts, and start anew with them."""
    if os.environ.get(_UNPACKED) == str(bundle):
        return
    site = Path(tempfile.mkdtemp(prefix="gpu_bundle_"))
    wheels = sorted(map(str, bundle.glob("*.whl")))
    assert wheels, f"{bundle} has no wheels: make gpu-bundle fills it"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(site),
        *wheels,
    ]
    subprocess.run(command, check=True)
    for archive in bundle.glob("*.tar.xz"):
        subprocess.run(["tar", "--extract", "--xz", "--file", str(archive), "--directory", str(site)], check=True)
    link = ROOT / "megatron_rl" / "patches"  # what an installation does: setup.py maps the one to the other
    if not link.exists():
        link.symlink_to("../patches")
    old = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(site), str(ROOT), *([old] if old else [])])
    environment = os.environ | {"PYTHONPATH": path, _UNPACKED: str(bundle)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


_UNPACKED = "MEGATRON_RL_GPU_BUNDLE"


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
    from common import last_json

    found = {"seconds": round(time.monotonic() - started, 1), **(last_json(printed) or {})}
    if status is None:
        found |= {"failed": f"not done after {limit_s:.0f} s", "output": complained[-1000:]}
    elif status:
        found.setdefault("failed", f"status {status}: {complained[-1500:]}")
    return found


def merge(path: Path, header: dict[str, Any], part: str, found: dict[str, Any]) -> dict[str, Any]:
    """Add what was found of one part to the file of the day, and judge the aims anew. Returns what the file holds.

    A part that is skipped now leaves what an earlier call has measured.
    """
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else header | {"ran": {}, "skipped": {}}
    if "skipped" in found:
        report["skipped"][part] = found["skipped"]
    else:
        report["skipped"].pop(part, None)
        report["ran"][part] = found
    report |= header | {"aims": judge(report["ran"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def judge(ran: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each aim: its value, what it should be, and whether it is; None where it was not measured."""
    aims = {}
    for name, (part, figure, sense, aim) in AIMS.items():
        value = ran.get(part, {}).get(figure)
        met = None if value is None else (value >= aim if sense == ">=" else value <= aim)
        aims[name] = {"value": value, "aim": f"{sense} {aim}", "met": met}
    return aims


def print_aims(aims: dict[str, dict[str, Any]]) -> None:
    """A line for each."""
    for name, aim in aims.items():
        value = "-" if aim["value"] is None else f"{aim['value']:.3g}"
        said = {None: "not measured", True: "met", False: "missed"}[aim["met"]]
        print(f"{name:60}{value:>8}  aim {aim['aim']}  {said}")


def device_name() -> str:
    """Name of the first GPU, or ``cpu``."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """Return the hardware and the versions that results are of."""
    import torch

    from megatron_rl.config.installed import version_of

    found: dict[str, Any] = {
        "gpu": device_name(),
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": {package: version_of(package) for package in PACKAGES},
    }
    if torch.cuda.is_available():
        found["num_gpus"] = torch.cuda.device_count()
        found["capability"] = list(torch.cuda.get_device_capability(0))
        found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


if __name__ == "__main__":
    sys.exit(main())
