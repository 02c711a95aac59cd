"""Do two checkouts of this repository take the same steps? Ten steps of each example by both, compared bit for bit.

    python benchmarks/first_steps.py BEFORE [AFTER] [--folder DIR] [--only NAME ...]

BEFORE and AFTER (this checkout, if it is not given) are folders of a repository. BEFORE makes what both start from: problems,
models, stored samples. The last line is one line of JSON: per example, how many of the compared figures differ. Without
BEFORE, as under ``make bench``, there is nothing to compare, and that line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
STEPS = 10
COMPARED = ("loss", "grad_norm", "reward/mean")
SHORT = (
    f"trainer.max_steps={STEPS}", "trainer.max_generated_tokens=null", "exp_manager.export_hf=false",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1000", "eval.before=false", "eval.after=false",
    "eval.every_n_steps=0",
)  # fmt: skip
PROBLEMS = "--num-warm-start 32000 --num-train 2000 --slip-share 0.3 --forgotten-carry-share 0.6 --num-held-out 100"
STYLES = "--blind-share 1.0 --slip-share 0.15"
CLI = """
try:
    from megatron_rl.commands.cli import main
except ImportError:  # an older checkout
    from megatron_rl.cli import main
main()
"""
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "quickstart": ("words", "quickstart/grpo.yaml", ()),
    "five_styles_grpo": ("styles", "five_styles/grpo.yaml", ("eval.pool=null",)),
    "five_styles_dph_forward": (
        "styles", "five_styles/dph_rl.yaml",
        ("algorithm.rehearsal.divergence=forward_kl", "algorithm.rehearsal.coef=0.2", "eval.pool=null"),
    ),
    "replay": ("words", "replay/rlep.yaml", ()),
    "segments_chain_5": ("words", "segments/chain.yaml", ("algorithm.partition.size=5",)),
    "segments_tree_4_4": ("words", "segments/tree.yaml", ()),
    "fp8_tensorwise": (
        "words", "fp8/grpo.yaml", ("policy.megatron_cfg.fp8=hybrid", "policy.megatron_cfg.fp8_recipe=tensorwise"),
    ),
}  # fmt: skip
"""Name -> where it starts, its config in examples/, its settings."""


def main() -> int:
    """Run what has no result yet, then compare."""
    parser = argparse.ArgumentParser(description="First steps of the examples by two checkouts.")
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("after", type=Path, nargs="?", default=HERE)
    parser.add_argument("--folder", type=Path, default=HERE / "runs" / "first_steps")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    if arguments.before is None:
        print(json.dumps({"skipped": "nothing to compare: python benchmarks/first_steps.py BEFORE, a second checkout"}))
        return 0
    folder = arguments.folder.resolve()
    before, after = arguments.before.resolve(), arguments.after.resolve()
    prepare(before, folder)
    differences = {}
    for name in arguments.only:
        rows = [first_steps(code, name, folder, label) for code, label in ((before, "before"), (after, "after"))]
        differences[name] = sum(a[key] != b[key] for a, b in zip(*rows, strict=True) for key in COMPARED)
        print(f"{name}: {differences[name]} of {len(rows[0]) * len(COMPARED)} figures differ", flush=True)
    print(json.dumps({"steps": STEPS, "figures": list(COMPARED), "differences": differences}))
    return int(any(differences.values()))


def prepare(code: Path, folder: Path) -> None:
    """Problems, warm starts and pools, where they are not there yet."""
    words, styles = folder / "words", folder / "styles"
    make = [sys.executable, "tools/make_word_problems.py", str(words / "data"), *PROBLEMS.split(), "--seed", "1"]
    run(code, make, words / "data" / "model")
    make = [sys.executable, "examples/five_styles/make_data.py", str(styles / "data"), "--seed", "1", *STYLES.split()]
    run(code, make, styles / "data" / "model")
    for start, example in ((words, "quickstart"), (styles, "five_styles")):
        data = (f"policy.model_path={start}/data/model", f"data.train={start}/data/warm_start.jsonl")
        warm = (*data, f"exp_manager.exp_dir={start}", "exp_manager.name=warm_start")
        run(code, verb("train", f"{example}/warm_start.yaml", *warm), start / "warm_start" / "hf")
    own = ("exp_manager.name=samples", "presample.num_problems=1000")
    for start, config in ((styles, "five_styles/dph_rl.yaml"), (words, "replay/rlep.yaml")):
        result = start / "samples" / "presample" / "summary.json"
        run(code, verb("presample", config, f"exp_manager.exp_dir={start}", *own, *places(start)), result)


def first_steps(code: Path, name: str, folder: Path, label: str) -> list[dict[str, float]]:
    """The metrics of ten steps of an example."""
    start, config, settings = RUNS[name]
    run_folder = folder / label / name
    own = (*places(folder / start), f"exp_manager.exp_dir={run_folder.parent}", f"exp_manager.name={name}")
    pools = {"five_styles_dph_forward": "rehearsal", "replay": "replay"}
    if name in pools:
        own += (f"algorithm.{pools[name]}.pool={folder / start}/samples/presample/pool",)
    command = verb("train", config, *own, "trainer.seed=1", *SHORT, *settings)
    run(code, command, run_folder / "summary.json")
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if all(key in row for key in COMPARED)]
    assert len(rows) == STEPS, f"{run_folder} has {len(rows)} steps"
    return rows


def places(start: Path) -> tuple[str, ...]:
    """Settings that name the model and the problems of a start."""
    return (
        f"policy.model_path={start}/warm_start/hf",
        f"data.train={start}/data/train.jsonl",
        f"data.validation={start}/data/held_out.jsonl",
    )


def verb(name: str, config: str, *overrides: str) -> list[str]:
    """``megatron-rl name config ...`` as a command."""
    return [sys.executable, "-c", CLI, name, f"examples/{config}", *overrides]


def run(code: Path, command: list[str], result: Path) -> None:
    """A command in a checkout, unless its result exists."""
    if result.exists():
        return
    print(f"== {code.name}: {result}", flush=True)
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=code, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
