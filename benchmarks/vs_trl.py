"""megatron_rl against TRL's GRPOTrainer: the same model, prompts and GRPO step, on the CPU or on one GPU.

    python benchmarks/vs_trl.py [--trl-python PATH]      without PATH, requirements/bench_trl.txt goes into .venv-trl
    python benchmarks/vs_trl.py --gpu --trl-python PATH

    tokens_per_s_ratio    completion tokens per second of whole steps, megatron_rl over TRL
    generate_ratio        the same of generation alone: prompt ids in, completion ids out
    update_ratio          the same of what follows until the new weights stand: log-probs before the first update, then
                          forward, backward, clipping and optimizer of every update

The rest of a step (scoring, advantages, weight sync, metrics, each trainer's own loop) counts into whole steps only. The
sides take turns, ``REPEATS`` processes each, the first ``WARM_UP`` steps of each left out; figures are medians over the
steps. Steps in which something waited for a processor for more than ``MAX_CROWDED`` of the time are left out as well, and
counted: threads that spin at a barrier while another program has the core lose far more than its share, TRL's more than
ours. Turns go on, up to ``MAX_TURNS``, until each side has ``MIN_QUIET`` quiet steps; on a GPU there are ``--repeats`` turns.
What is known so far is printed after each process, as a line of JSON.

Lengths
    spread    the model as initialised: any token may be the end, so lengths are geometric, cut at the limit
    equal     the end token's logit is far below all others, in the weights both sides load: every completion has full length

Alike on both sides
    model and prompts   the quickstart's: 0.8M-parameter Qwen3, word problems of 16 to 36 tokens, in the same order
    step                32 prompts x 8 completions, at most 96 tokens at temperature 1, then 2 updates on 128 rows each,
                        so that both sides must compute the log-probs before the first update. Setting ``equal, 1 update``:
                        one update of all 256 rows, where TRL needs no such pass and omits it
    objective           ratio clipped at 0.2, mean over tokens, group-normalised rewards, no KL, entropy as a metric
    optimizer           AdamW, constant rate, no weight decay, gradient norm clipped at 1; fp32 throughout
    reward              the share of digits in the text, a function of a microsecond
    process             one, with as many threads as the machine has cores; the allocator settings of megatron_rl's launcher

TRL, at its best here
    generation          ``transformers``, all 256 rows at once
    batch               TRL_BATCH rows a forward, the fastest of 128, 64, 32 and 16
    attention           eager, a few per cent faster here than sdpa
    optimizer           torch's fused AdamW
    off                 gradient checkpointing (TRL's default), bf16 (default), dropout, KL, logging, saving, progress bars,
                        data loader workers, pinned memory
    not tried           torch.compile, transformers' continuous batching

megatron_rl
    the quickstart's config on one rank: Megatron-Core with the distributed optimizer, one scoring worker, metrics written
    at each step, no checkpoints, no evaluation. MEGATRON_RL_TOKENS tokens a forward, the fastest of 2048, 4096, 8192, 16384.

On a GPU
    model               Qwen2.5-0.5B's sizes and vocabulary, random; all completions have full length. bfloat16: TRL's weights
                        and optimizer state too, ours with Megatron's float32 main weights
    step                32 prompts x 8 completions of 256 tokens, 2 updates
    not tuned           rows and tokens of a forward are guesses; TRL's attention is sdpa

Figures of the CPU are of a model so small that much of the time is spent beside the arithmetic; a larger one shifts the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent
sys.path.insert(0, str(HERE / "vs_trl"))

from common import Work  # noqa: E402

from megatron_rl.tasks.word_tokenizer import ModelSize  # noqa: E402

REPEATS, WARM_UP, STEPS = 3, 2, 4
MAX_CROWDED, MIN_QUIET, MAX_TURNS = 0.1, 8, 10
NUM_PROMPTS, NUM_GENERATIONS = 32, 8
PHASES = {"tokens_per_s": ("generate", "update", "rest"), "generate": ("generate",), "update": ("update",)}


@dataclass(frozen=True)
class Setting:
    """One comparison."""

    lengths: str
    num_updates: int

    @property
    def name(self) -> str:
        """In table and JSON."""
        return f"{self.lengths}, {self.num_updates} update{'s' if self.num_updates > 1 else ''}"


@dataclass(frozen=True)
class Place:
    """Where it is measured, and what fits there."""

    device: str
    settings: tuple[Setting, ...]
    """The first is the one whose ratios stand at the top of the JSON."""
    size: ModelSize
    vocab_size: int | None
    """Of the model, where larger than the tokenizer's."""
    max_new_tokens: int
    trl_batch_size: int
    trl_attention: str
    megatron_rl_tokens: int


CPU = Place(
    "cpu", (Setting("spread", 2), Setting("equal", 2), Setting("equal", 1)), ModelSize(), None, 96, 32, "eager", 16384
)
GPU = Place(
    "gpu", (Setting("equal", 2),), ModelSize(896, 24, 14, 2, 4864, max_positions=1024), 151_936, 256, 32, "sdpa", 32768
)


def main() -> None:
    """Measure all settings, print a table, and a line of JSON last."""
    parser = argparse.ArgumentParser(description="megatron_rl against TRL on the CPU.")
    parser.add_argument("--trl-python", type=Path, help="interpreter of an environment that has TRL")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns, at least")
    parser.add_argument("--steps", type=int, default=STEPS, help="measured steps of each process")
    parser.add_argument("--gpu", action="store_true", help="on one GPU, with a model of half a billion parameters")
    arguments = parser.parse_args()
    place = GPU if arguments.gpu else CPU
    pythons = {"megatron_rl": Path(sys.executable), "trl": arguments.trl_python or install_trl()}
    num_threads = len(os.sched_getaffinity(0))
    figures: dict[str, dict[str, float]] = {}
    versions: dict[str, dict[str, str]] = {}

    def summary() -> dict[str, object]:
        """Of what is known so far."""
        first = figures[place.settings[0].name]
        return {
            **{key: value for key, value in first.items() if key.endswith("_ratio")},
            "settings": figures,
            "versions": versions,
            "machine": machine(place),
            "threads": num_threads,
            "warm_up_steps": WARM_UP,
            "steps": arguments.steps,
            "repeats": arguments.repeats,
        }

    for setting in place.settings:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), setting, place, num_prompts=NUM_PROMPTS * (WARM_UP + arguments.steps))
            work = Work(
                directory=folder,
                num_steps=WARM_UP + arguments.steps,
                num_threads=num_threads,
                num_prompts=NUM_PROMPTS,
                num_generations=NUM_GENERATIONS,
                max_new_tokens=place.max_new_tokens,
                num_updates=setting.num_updates,
                trl_batch_size=place.trl_batch_size,
                trl_attention=place.trl_attention,
                megatron_rl_tokens=place.megatron_rl_tokens,
                device=place.device,
            )
            steps: dict[str, list[dict[str, float]]] = {side: [] for side in pythons}
            for turn in range(MAX_TURNS):
                enough = arguments.gpu or all(len(quiet(of)) >= MIN_QUIET for of in steps.values())
                if turn >= arguments.repeats and enough:
                    break
                for side, python in pythons.items():
                    report = run_worker(side, python, work)
                    versions[side] = report["versions"]
                    steps[side] += report["steps"][WARM_UP:]
                    print(f"{setting.name}: {side}", summarise(report["steps"][WARM_UP:]), flush=True)
                    figures[setting.name] = compare({side: summarise(of) for side, of in steps.items() if of})
                    print(json.dumps(summary()), flush=True)
    print_table(figures)
    print(json.dumps(summary()))


def install_trl() -> Path:
    """An environment with TRL, made on the first call."""
    environment, requirements = ROOT / ".venv-trl", ROOT / "requirements/bench_trl.txt"
    python, done = environment / "bin/python", environment / ".installed"
    if not done.exists() or done.read_text() != requirements.read_text():
        print("installing TRL into .venv-trl", flush=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements]
        subprocess.run(pip, check=True)
        done.write_text(requirements.read_text())
    return python


def write_inputs(directory: Path, setting: Setting, place: Place, *, num_prompts: int) -> None:
    """The model, the problems for megatron_rl, and their prompts for TRL."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from megatron_rl.tasks import get_task
    from megatron_rl.tasks.word_problems import generate, write_rows
    from megatron_rl.tasks.word_tokenizer import END, VOCABULARY, save_model

    save_model(directory / "model", place.size)
    if place.vocab_size is not None:
        path = directory / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": place.vocab_size}))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory / "model"))
    if setting.lengths == "equal":
        # One direction of the residual stream is the same for every token but the end, and the tied output layer reads it.
        embedding = model.get_input_embeddings().weight.data
        embedding[:, 0] = 1.0
        embedding[VOCABULARY.index(END), 0] = -4.0
    logging.disable_progress_bar()
    model.save_pretrained(directory / "model")
    write_rows(directory / "problems.jsonl", generate(num_prompts, seed=1))
    problems = get_task("word_problems").load(directory / "problems.jsonl", template=None)
    assert len(problems) == num_prompts
    (directory / "prompts.json").write_text(json.dumps([problem.prompt for problem in problems]))


def run_worker(side: str, python: Path, work: Work) -> dict:
    """One process of one side, from start to end."""
    from megatron_rl.launch.command import ALLOCATOR

    environment = os.environ | ALLOCATOR
    environment |= {
        "OMP_NUM_THREADS": str(work.num_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(HERE / "vs_trl"), os.environ.get("PYTHONPATH", "")]),
    }
    script = HERE / "vs_trl" / {"megatron_rl": "ours.py", "trl": "theirs.py"}[side]
    command = [str(python), str(script), json.dumps(asdict(work))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def quiet(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """The steps that had the machine to themselves."""
    return [step for step in steps if step["crowded"] <= MAX_CROWDED]


def summarise(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the quiet steps (over all of them where hardly one was quiet).

    Returns:
        Completion tokens per second, overall and by phase; seconds of a step by phase; its tokens; how many steps count.
    """
    chosen = quiet(steps) if len(quiet(steps)) >= MIN_QUIET // 4 else steps
    values = {
        name: [step["tokens"] / sum(step[phase] for phase in phases) for step in chosen]
        for name, phases in PHASES.items()
    }
    values |= {f"{phase}_s": [step[phase] for step in chosen] for phase in PHASES["tokens_per_s"]}
    values["tokens"] = [step["tokens"] for step in chosen]
    values["crowded"] = [step["crowded"] for step in chosen]
    medians = {key: round(statistics.median(of), 3) for key, of in values.items()}
    return medians | {"quiet_steps": len(quiet(steps)), "all_steps": len(steps)}


def compare(sides: dict[str, dict[str, float]]) -> dict[str, float]:
    """Both sides' figures, and ratios once there are both: above 1 megatron_rl is faster."""
    ratios = {}
    if len(sides) == 2:
        ratios = {f"{name}_ratio": round(sides["megatron_rl"][name] / sides["trl"][name], 3) for name in PHASES}
    return ratios | {f"{side}_{key}": value for side, of in sides.items() for key, value in of.items()}


def print_table(figures: dict[str, dict[str, float]]) -> None:
    """Seconds of a step, then ratios."""
    print(f"\n{'':20}{'':14}{'generate':>10}{'update':>10}{'rest':>10}{'tokens':>10}{'tokens/s':>10}")
    for name, row in figures.items():
        for side in ("megatron_rl", "trl"):
            seconds = "".join(f"{row[f'{side}_{phase}_s']:10.3f}" for phase in PHASES["tokens_per_s"])
            print(f"{name:20}{side:14}{seconds}{row[f'{side}_tokens']:10.0f}{row[f'{side}_tokens_per_s']:10.0f}")
        ratios = f"{row['generate_ratio']:10.2f}{row['update_ratio']:10.2f}{'':20}{row['tokens_per_s_ratio']:10.2f}"
        print(f"{name:20}{'ratio':14}{ratios}")


def machine(place: Place) -> str:
    """Processor or GPU in words."""
    if place.device == "gpu":
        import torch

        return f"one {torch.cuda.get_device_name(0)}"
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    units = "with AMX" if "amx_tile" in text else "without AMX"
    return f"{len(os.sched_getaffinity(0))} cores, {models[0] if models else 'unknown processor'}, {units}, no GPU used"


if __name__ == "__main__":
    main()
