"""Problems of the example with a real model: only short ones, solutions that are right, sums that are not trained on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from megatron_rl.tasks import get_task
from megatron_rl.tasks.problems import load_problems

ROOT = Path(__file__).parents[3]
ROWS = ROOT / "tests" / "real" / "gsm8k.jsonl"


def test_short_problems_of_gsm8k(tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("".join(line + "\n" for line in ROWS.read_text().splitlines()[20:]))
    command = [sys.executable, "-m", "examples.real_model.make_data", str(ROWS), str(test), str(tmp_path / "data")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)
    rows = [json.loads(line) for line in (tmp_path / "data" / "demonstrations.jsonl").read_text().splitlines()]
    assert 15 < len(rows) <= 24
    assert all(row["solution"].count("=") <= 2 and row["solution"].endswith(f"#### {row['answer']}") for row in rows)
    score = get_task("math").score
    problems = load_problems("math", tmp_path / "data" / "demonstrations.jsonl")
    assert all(problem.solution is not None and score(problem, problem.solution).reward == 1 for problem in problems)
    assert 8 < len((tmp_path / "data" / "held_out.jsonl").read_text().splitlines()) <= 12
    trained, held_out = (
        set((tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()) for name in ("sums", "held_out_sums")
    )
    assert (len(trained), len(held_out), len(trained & held_out)) == (2400, 100, 0)
    row = json.loads(min(held_out))
    first, second = re.findall(r"\d+", row["question"])
    assert int(first) + int(second) == int(row["answer"])
