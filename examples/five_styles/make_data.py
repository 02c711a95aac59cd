"""Write data and model directory of the five-style experiment: ``python -m examples.five_styles.make_data DIRECTORY``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from examples.five_styles.task import (
    CLASSES,
    FAVOURED,
    FAVOURED_SLIP,
    VOCABULARY,
    ClassOf,
    Errors,
    Shares,
    generate,
    shares_by_style,
)
from megatron_rl.commands.verbs import run_script
from megatron_rl.errors import UserError
from megatron_rl.tasks.word_problems import Split, write_rows
from megatron_rl.tasks.word_tokenizer import ModelSize, save_model

OPERATIONS = [1, 2, 3, 4]


def main(
    directory: Annotated[Path, typer.Argument(help="Where warm_start.jsonl, train.jsonl, held_out.jsonl, model/ go.")],
    num_warm_start: Annotated[int, typer.Option(help="Demonstrations.")] = 32_000,
    num_train: Annotated[int, typer.Option(help="Problems for RL.")] = 4_000,
    num_held_out: Annotated[int, typer.Option(help="Problems to evaluate on.")] = 200,
    num_operations: Annotated[list[int], typer.Option(help="Operations of a problem; repeat it.")] = OPERATIONS,
    blind_share: Annotated[float, typer.Option(help="Share of blind steps that are wrong.")] = Shares.blind,
    blind_class: Annotated[str, typer.Option(help=f"What makes a step's class: {', '.join(CLASSES)}.")] = "result",
    slip_share: Annotated[float, typer.Option(help="Share of multi-step solutions with a slip.")] = Shares.slip,
    favoured: Annotated[str, typer.Option(help="The style that slips less often.")] = FAVOURED,
    favoured_slip_share: Annotated[float, typer.Option(help="The same share in that style.")] = FAVOURED_SLIP,
    seed: int = 1,
    hidden_size: int = ModelSize.hidden_size,
    num_layers: int = ModelSize.num_layers,
    num_heads: int = ModelSize.num_heads,
    num_kv_heads: int = ModelSize.num_kv_heads,
    intermediate_size: int = ModelSize.intermediate_size,
    tied: bool = ModelSize.is_tied,
) -> None:
    """Problems of the three splits share no chain of numbers and operations; only demonstrations have errors."""
    size = ModelSize(hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, tied)
    shares = shares_by_style(blind=blind_share, slip=slip_share, favoured=favoured, favoured_slip=favoured_slip_share)
    errors = Errors(shares, choose_class(blind_class))
    splits: dict[Split, tuple[int, Errors]] = {
        "warm_start": (num_warm_start, errors),
        "train": (num_train, errors.without()),
        "held_out": (num_held_out, errors.without()),
    }
    for split, (num_problems, errors_of_split) in splits.items():
        rows = generate(num_problems, seed=seed, split=split, num_operations=num_operations, errors=errors_of_split)
        write_rows(directory / f"{split}.jsonl", rows)
    save_model(directory / "model", size, VOCABULARY)
    typer.echo(f"wrote {num_warm_start} + {num_train} + {num_held_out} problems and model/ to {directory}")


def choose_class(name: str) -> ClassOf:
    """Return the function that decides which style is blind to a step."""
    if name not in CLASSES:
        raise UserError("blind_class", name, f"must be one of {', '.join(CLASSES)}", "choose one")
    return CLASSES[name]


if __name__ == "__main__":
    run_script(main)
