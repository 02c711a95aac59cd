"""A pool of a million trajectories: how long it takes to open, and to read ten thousand of them at random.

    python benchmarks/pool.py [--rows 1000000]

open_s, sample_s      seconds to open, and to read 10,000 random trajectories (checksums compared) for the first time
memory_ratio          memory that opening and reading add (pages of files not counted), over that of a pool of a hundredth
write_rows_per_s      of the writer, fsync included
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_rl.data.pool import Pool, PoolWriter, Provenance, Trajectory


def main() -> None:
    """Build both pools, measure each in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(read(arguments.child)))
        return
    with tempfile.TemporaryDirectory(prefix="pool_") as name:
        folder = Path(name)
        build(folder / "small", arguments.rows // 100)
        started = time.perf_counter()
        build(folder / "large", arguments.rows)
        per_s = arguments.rows / (time.perf_counter() - started)
        found = {size: measure(folder / size) for size in ("small", "large")}
    for size, each in found.items():
        print(f"{size:6} open {each['open_s']:.3f} s, 10,000 rows {each['sample_s']:.3f} s, {each['added_mb']:.1f} MB")
    large = found["large"]
    line = {
        "open_s": round(large["open_s"], 3),
        "sample_s": round(large["sample_s"], 3),
        "memory_ratio": round(large["added_mb"] / found["small"]["added_mb"], 2),
        "write_rows_per_s": round(per_s),
    }
    print(json.dumps(line))


def build(directory: Path, count: int) -> None:
    """Trajectories of 20 to 80 tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 80, size=count)
    ids = torch.from_numpy(generator.integers(0, 150_000, size=200))
    log_probs = -torch.rand(200, generator=torch.Generator().manual_seed(0))
    with PoolWriter(directory, Provenance("benchmark", "model", "tokenizer")) as writer:
        for number, length in enumerate(lengths.tolist()):
            first = number % 100
            end = first + length
            writer.add(Trajectory(str(number), ids[:30], ids[first:end], 1.0, ref_log_probs=log_probs[first:end]))


def measure(directory: Path) -> dict[str, float]:
    """In a fresh process."""
    command = [sys.executable, __file__, "--child", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def read(directory: Path) -> dict[str, float]:
    """Open, and read at random."""
    before, started = anonymous_mb(), time.perf_counter()
    pool = Pool(directory)
    opened = time.perf_counter()
    numbers = np.random.default_rng(1).integers(0, len(pool), size=10_000)
    total = sum(len(trajectory.response_ids) for trajectory in pool.take(numbers))
    ended = time.perf_counter()
    assert total > 0
    return {"open_s": opened - started, "sample_s": ended - opened, "added_mb": anonymous_mb() - before}


def anonymous_mb() -> float:
    """Resident memory that no file stands behind."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1e3


if __name__ == "__main__":
    main()
