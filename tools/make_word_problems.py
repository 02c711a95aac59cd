"""Write data and model directory of the word-problem quickstart: python tools/make_word_problems.py DIRECTORY."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.commands.verbs import run_script
from megatron_rl.tasks.word_problems import generate, write_rows
from megatron_rl.tasks.word_tokenizer import ModelSize, save_model


def main(
    directory: Annotated[Path, typer.Argument(help="Where warm_start.jsonl, train.jsonl, held_out.jsonl, model/ go.")],
    num_warm_start: Annotated[int, typer.Option(help="Demonstrations.")] = 20_000,
    num_train: Annotated[int, typer.Option(help="Problems for RL.")] = 20_000,
    num_held_out: Annotated[int, typer.Option(help="Problems to evaluate on.")] = 500,
    num_operations: Annotated[list[int], typer.Option(help="Operations of a problem; repeat the option.")] = [1, 2, 3],  # noqa: B006
    slip_share: Annotated[float, typer.Option(help="Share of wrong steps in the demonstrations.")] = 0.2,
    forgotten_carry_share: Annotated[float, typer.Option(help="Share of carries the demonstrations forget.")] = 0.0,
    shuffle_statements: Annotated[bool, typer.Option(help="Statements in random order.")] = False,
    seed: int = 1,
    hidden_size: int = ModelSize.hidden_size,
    num_layers: int = ModelSize.num_layers,
    num_heads: int = ModelSize.num_heads,
    num_kv_heads: int = ModelSize.num_kv_heads,
    intermediate_size: int = ModelSize.intermediate_size,
    tied: bool = ModelSize.is_tied,
) -> None:
    """Problems of the three splits share no chain of numbers and operations; only demonstrations have slips."""
    shared = {"seed": seed, "num_operations": num_operations, "shuffle_statements": shuffle_statements}
    size = ModelSize(hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, tied)
    warm_start = generate(
        num_warm_start, split="warm_start", slip_share=slip_share, forgotten_carry_share=forgotten_carry_share, **shared
    )
    write_rows(directory / "warm_start.jsonl", warm_start)
    write_rows(directory / "train.jsonl", generate(num_train, split="train", **shared))
    write_rows(directory / "held_out.jsonl", generate(num_held_out, split="held_out", **shared))
    save_model(directory / "model", size)
    typer.echo(f"wrote {num_warm_start} + {num_train} + {num_held_out} problems and model/ to {directory}")


if __name__ == "__main__":
    run_script(main)
