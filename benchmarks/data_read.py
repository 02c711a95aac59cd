"""A million rows of parquet in verl's layout, as a run reads them: against reading all of them first.

    python benchmarks/data_read.py [--rows 1000000]

Each way is a process of its own that ends when it has 64 prompts in shuffled order, as token ids:

    ours     tasks/problems.py: rows stay on disk, each is read when its turn comes; the first start also writes the cache
    cached   the same once more
    all      pyarrow reads the whole file, as Python objects, as trainers do that keep their data set in memory

The last line is JSON: ``seconds_to_first`` and ``peak_mb`` of ours at its first start, ``seconds_vs_all`` and ``memory_vs_all``
(ours over all). Seconds begin when torch and transformers are imported, which takes any run ``import_s``; ``datasets`` is not.
Memory is resident, with all that is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_PROMPTS, CHUNK = 64, 50_000


def main() -> None:
    """Write the file, start each way, print what they took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--way", choices=["ours", "all"], help="be one of the processes")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.way:
        begun = time.monotonic()
        import torch  # noqa: F401
        import transformers  # noqa: F401

        started = time.monotonic()
        (ours if arguments.way == "ours" else everything)(arguments.folder)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        seconds = {"import_s": started - begun, "seconds": time.monotonic() - started}
        print(json.dumps(seconds | {"peak_mb": peak_mb}))
        return
    from megatron_rl.tasks.word_tokenizer import ModelSize, save_model

    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", ModelSize(hidden_size=16, num_layers=1))
        write(folder / "problems.parquet", arguments.rows)
        size_mb = (folder / "problems.parquet").stat().st_size / 1e6
        for label, way in (("ours", "ours"), ("cached", "ours"), ("all", "all")):
            found[label] = measure(way, folder)
            print(f"{label:8} {found[label]['seconds']:6.2f} s   {found[label]['peak_mb']:7.0f} MB", flush=True)
    print(f"{arguments.rows} rows, {size_mb:.0f} MB on disk")
    line = {
        "seconds_to_first": round(found["ours"]["seconds"], 2),
        "peak_mb": round(found["ours"]["peak_mb"]),
        "seconds_to_first_cached": round(found["cached"]["seconds"], 2),
        "seconds_vs_all": round(found["ours"]["seconds"] / found["all"]["seconds"], 3),
        "memory_vs_all": round(found["ours"]["peak_mb"] / found["all"]["peak_mb"], 3),
        "import_s": round(found["ours"]["import_s"], 2),
        "rows": arguments.rows,
    }
    print(json.dumps(line))


def write(path: Path, num_rows: int) -> None:
    """Write rows with prompts of some 250 characters, no two alike."""
    import pyarrow
    import pyarrow.parquet

    writer = None
    for start in range(0, num_rows, CHUNK):
        rows = [row(number) for number in range(start, min(start + CHUNK, num_rows))]
        table = pyarrow.Table.from_pylist(rows)
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def row(number: int) -> dict[str, object]:
    """Make one row in verl's layout."""
    story = " ".join(f"Box {part} holds {number * part % 9973} marbles." for part in range(1, 9))
    return {
        "data_source": "boxes",
        "prompt": [{"role": "user", "content": f"{story} How many are there in all?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(number)},
        "extra_info": {"index": number, "split": "train"},
    }


def measure(way: str, folder: Path) -> dict[str, float]:
    """Start one way; return its seconds and its peak memory."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def ours(folder: Path) -> None:
    """Take the first prompts as a run does."""
    from megatron_rl.data.prompts import LazyPrompts, PromptMaker
    from megatron_rl.data.stream import Stream
    from megatron_rl.tasks.problems import open_problems

    problems = open_problems("math", [str(folder / "problems.parquet")])
    tokenizer, config = parts_of_a_run(folder)
    maker = PromptMaker(tokenizer, config, context_length=4096, max_new_tokens=1024)
    stream = Stream(LazyPrompts(problems, maker, lambda _: None), seed=1, shuffle=True)
    assert len(stream.take(NUM_PROMPTS)) == NUM_PROMPTS


def everything(folder: Path) -> None:
    """Take the first prompts of a list of all rows."""
    import random

    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(folder / "problems.parquet").to_pylist()
    tokenizer, _ = parts_of_a_run(folder)
    random.Random(1).shuffle(rows)
    for each in rows[:NUM_PROMPTS]:
        tokenizer.apply_chat_template(each["prompt"], tokenize=True, add_generation_prompt=True)


def parts_of_a_run(folder: Path) -> tuple[object, object]:
    """Return a tokenizer with a chat template, and a ``data`` section."""
    from transformers import AutoTokenizer

    from megatron_rl.config.data import DataConfig

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    return tokenizer, DataConfig(train=["problems.parquet"])


if __name__ == "__main__":
    main()
