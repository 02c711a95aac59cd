"""Freeze servers around a weight update in all ways, and say what becomes of the run.

    python -m tests.servers.freezes FOLDER

Before, in and after an update; the scheduler or the process that answers HTTP; one of two servers or both. The last line is the
table as JSON. ``test_own_servers.py`` has the short form.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.policy_case import CONFIG
from tests.servers.planted_sync import VARIABLE
from tests.tiny_models import make_tiny_model

HEALTH_TIMEOUT_S, VERSION, STEPS = 12, 2, 5
CASES = list(itertools.product(("before", "during", "after"), ("scheduler", "server"), (1, 2)))


def freeze(root: Path, model: Path, when: str, part: str, count: int) -> dict[str, Any]:
    """One run with the fault, to its end."""
    folder = root / f"{when}_{part}_{count}"
    overrides = {
        "policy.model_path": model,
        "data.train": root / "train.jsonl",
        "exp_manager.exp_dir": folder,
        "exp_manager.export_hf": "false",
        "exp_manager.create_checkpoint_callback": "false",
        "trainer.max_steps": STEPS,
        "rollout.engine": "sglang",
        "rollout.max_new_tokens": 40,
        "policy.train_micro_batch_tokens": 1024,
        "algorithm.overlong.buffer": 40,
        "rollout.sglang_cfg.max_total_tokens": 4096,
        "rollout.servers.num_per_node": 2,
        "rollout.servers.health_interval_s": 1,
        "rollout.servers.health_timeout_s": HEALTH_TIMEOUT_S,
    }
    launch = [
        "megatron_rl.launch",
        "--standalone",
        "--nproc-per-node=1",
        str(Path(__file__).with_name("planted_sync.py")),
    ]
    arguments = [str(CONFIG), *(f"{key}={value}" for key, value in overrides.items())]
    faults = {str(VERSION): (when, part, "SIGSTOP", count)}
    folder.mkdir(parents=True)
    started = time.monotonic()
    with (folder / "output").open("w") as output:
        status = subprocess.run(
            [sys.executable, "-m", *launch, "--config", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                VARIABLE: json.dumps(faults),
                "PYTHONWARNINGS": "ignore",
                "MEGATRON_RL_TEST_MARK": folder.name,
            },
        ).returncode
    text = (folder / "output").read_text()
    rows = [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]
    return {
        "when": when,
        "process": part,
        "servers": count,
        "status": status,
        "frozen": text.count("planted: SIGSTOP"),
        "restarts": int(sum(row["rollout/server_restarts"] for row in rows)),
        "steps": [int(row["step"]) for row in rows] == list(range(1, STEPS + 1)),
        "is_on_policy": all(row["rollout/staleness"] == 0.0 for row in rows),
        "longest_step_s": round(max(row["time/step_s"] for row in rows), 1),
        "run_s": round(time.monotonic() - started, 1),
    }


def main() -> None:
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    model = make_tiny_model(root / "model", "qwen3", tied=True, seed=3, tokenizer=True, max_position_embeddings=512)
    rows = [{"question": f"What is {n} plus {n % 7}?", "answer": f"#### {n + n % 7}"} for n in range(24)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcomes = []
    for case in CASES:
        outcomes.append(freeze(root, model, *case))
        print(outcomes[-1], flush=True)
    healed = sum(
        o["status"] == 0 and o["frozen"] == o["servers"] and o["steps"] and o["is_on_policy"] for o in outcomes
    )
    print(
        json.dumps(
            {"cases": len(outcomes), "healed": healed, "health_timeout_s": HEALTH_TIMEOUT_S, "outcomes": outcomes}
        )
    )


if __name__ == "__main__":
    main()
