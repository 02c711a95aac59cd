"""``megatron-rl plan weights CONFIG``: compute what each weight sync of a config will move."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from megatron_rl.config import Config, read_model_shape
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.weight_sync.layouts import rollout_layout, training_layout
from megatron_rl.weight_sync.plan import Plan, TrainingLayout, make_plan, rounds
from megatron_rl.weight_sync.served import RolloutLayout


@dataclass(frozen=True)
class Report:
    """Traffic of one weight sync."""

    shape: ModelShape
    training: TrainingLayout
    rollout: RolloutLayout
    plan: Plan
    bytes_per_element: int
    num_rounds: int
    critical_bytes: int
    """Bytes of the largest pair of each round, summed: the sync waits for these if all links are equally fast."""

    @property
    def bound_bytes(self) -> int:
        """Return the bytes that bound any schedule: the busiest rank's, if senders share their load evenly."""
        holders = sum(self.plan.sent.values()) / len(self.plan.sent)
        return math.ceil(max(holders, *self.plan.received.values())) * self.bytes_per_element


def report(config: Config) -> Report:
    """Compute the plan and its traffic.

    Raises:
        UserError: the model cannot be read, or a layout does not fit it.
    """
    shape = read_model_shape(config)
    training, rollout = training_layout(config, shape), rollout_layout(config)
    plan = make_plan(shape, training, rollout)
    width = 2 if config.trainer.precision == "bf16" else 4
    num_rounds = critical = 0
    for copies in rounds(plan):
        num_rounds += 1
        pairs: dict[tuple[int, int], int] = defaultdict(int)
        for copy in copies:
            pairs[copy.sender, copy.receiver] += math.prod(copy.overlap.size)
        critical += max(pairs.values())
    return Report(shape, training, rollout, plan, width, num_rounds, critical * width)


def print_report(found: Report) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    plan, width = found.plan, found.bytes_per_element
    training, rollout = found.training, found.rollout
    table = Table("", "ranks", "GB, least", "GB, most", title="one weight sync")
    for side, loads in (("sent by trainer ranks", plan.sent), ("received by server ranks", plan.received)):
        sizes = [load * width / 1e9 for load in loads.values()]
        table.add_row(side, str(len(loads)), f"{min(sizes):.3f}", f"{max(sizes):.3f}")
    console = Console()
    console.print(
        f"{found.shape.family}, {found.shape.num_layers} layers: {training.num_ranks} trainer ranks "
        f"-> {rollout.num_servers} servers of {rollout.tp_size} ranks"
    )
    console.print(table)
    console.print(f"copies {len(plan.copies):,}, in {found.num_rounds} rounds of pairs that do not share a rank")
    console.print(f"bytes received over bytes held: {plan.received_ratio:.3f} (1.000: nothing sent in vain)")
    console.print(
        f"on the critical path {found.critical_bytes / 1e9:.3f} GB, at least {found.bound_bytes / 1e9:.3f} GB: "
        f"ratio {found.critical_bytes / found.bound_bytes:.2f}"
    )
