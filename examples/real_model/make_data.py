"""Write what a small model can learn: problems of GSM8K with short solutions as demonstrations, and sums to practise on."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.files import write_atomic
from megatron_rl.tasks.rows.open import open_rows

CALCULATION = re.compile(r"<<([^<>]+=[^<>]+)>>")
"""GSM8K marks each calculation of a worked solution so."""
MAX_CALCULATIONS, MAX_CHARACTERS = 2, 240
NUM_DEMONSTRATIONS, NUM_HELD_OUT = 1200, 100
LARGEST = 50
"""Summands are from 1 to this."""


def short_rows(file: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a problem file that are short enough, their solutions reduced to the calculations.

    Args:
        file: as ``data.train`` takes it, in the layout of GSM8K.
    """
    for row in open_rows([file], field="GSM8K"):
        question, (worked, _, number) = row.values["question"], row.values["answer"].rpartition("####")
        steps = CALCULATION.findall(worked)
        if (
            1 <= len(steps) <= MAX_CALCULATIONS
            and len(question) <= MAX_CHARACTERS
            and steps[-1].endswith(f"={number.strip()}")
        ):
            solution = "\n".join([*steps, f"#### {number.strip()}"])
            yield {"question": question, "answer": number.strip(), "solution": solution}


def sums() -> list[dict[str, str]]:
    """Return all questions for the sum of two numbers; they have no solutions."""
    numbers = range(1, LARGEST + 1)
    return [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in numbers for b in numbers]


def main() -> None:
    """Write demonstrations.jsonl from one split of GSM8K and held_out.jsonl from the other; sums to train on, and others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rows, held_out, drawn = list(short_rows(arguments.train)), list(short_rows(arguments.test)), sums()
    random.Random(arguments.seed).shuffle(rows)
    for shuffled in (held_out, drawn):
        random.Random(0).shuffle(shuffled)  # the same for all seeds
    files = {
        "demonstrations": rows[:NUM_DEMONSTRATIONS],
        "held_out": held_out[:NUM_HELD_OUT],
        "sums": drawn[NUM_HELD_OUT:],
        "held_out_sums": drawn[:NUM_HELD_OUT],
    }
    for name, chosen in reversed(files.items()):
        write_atomic(arguments.folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in chosen))
        print(f"{len(chosen)} problems in {arguments.folder / name}.jsonl")


if __name__ == "__main__":
    main()
