"""``megatron-rl plan weights CONFIG``: compute what each weight sync of a config will move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_rl.config import Config, read_model_shape
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.weight_sync.buckets import buckets_of
from megatron_rl.weight_sync.layouts import places_of, rollout_layout, served_form, training_layout
from megatron_rl.weight_sync.pieces import TrainingLayout
from megatron_rl.weight_sync.plan import Plan, between_nodes, make_plan
from megatron_rl.weight_sync.served import RolloutLayout


@dataclass(frozen=True)
class Traffic:
    """Messages of a plan: buckets that a server rank reads something of, and what ranks fetch from other machines."""

    num_messages: int
    most_messages: int
    """The number of messages to the server rank that has most."""
    most_partners: int
    """Trainer ranks that one server rank gets something from."""


@dataclass(frozen=True)
class Report:
    """Traffic of one weight sync."""

    shape: ModelShape
    training: TrainingLayout
    rollout: RolloutLayout
    plan: Plan
    traffic: Traffic


def report(config: Config) -> Report:
    """Compute the plan and its traffic.

    Raises:
        UserError: the model cannot be read, or a layout does not fit it.
    """
    shape = read_model_shape(config)
    training, rollout = training_layout(config, shape), rollout_layout(config)
    places = places_of(config, rollout, is_cpu=config.trainer.accelerator == "cpu")
    form, bucket_bytes = served_form(config), config.weight_sync.bucket_bytes
    plan = make_plan(shape, training, rollout, places, form, bucket_bytes=bucket_bytes)
    return Report(shape, training, rollout, plan, traffic_of(plan))


def traffic_of(plan: Plan) -> Traffic:
    """Count the messages of a plan."""
    messages: Counter[int] = Counter()
    num_fetched = 0
    known: dict[tuple[object, ...], list[tuple[set[int], int]]] = {}
    for stream in plan.streams:
        # Streams with the same bundles have the same buckets, whoever takes part.
        senders = {origin: number for number, origin in enumerate(dict.fromkeys(c.origin for c in stream.carried))}
        key = (
            stream.bucket_bytes,
            *((c.bundle.number, senders[c.origin], c.origin == stream.sender) for c in stream.carried),
        )
        if key not in known:
            known[key] = [
                ({each.carried.bundle.number for each in bucket.placed}, len(bucket.fetched(stream.sender)))
                for bucket in buckets_of(stream)
            ]
        for numbers, num_origins in known[key]:
            num_fetched += num_origins
            taking = [carried.takers for carried in stream.carried if carried.bundle.number in numbers]
            messages.update({taker for takers in taking for taker in takers})
    return Traffic(sum(messages.values()) + num_fetched, max(messages.values()), max(plan.partners().values()))


def print_report(found: Report) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    plan, traffic = found.plan, found.traffic
    training, rollout = found.training, found.rollout
    table = Table("", "ranks", "GB, least", "GB, most", title="one weight sync")
    received = plan.received()
    for side, loads in (("handed on by trainer ranks", plan.sent()), ("received by server ranks", received)):
        sizes = [load / 1e9 for load in loads.values()]
        table.add_row(side, str(len(loads)), f"{min(sizes):.3f}", f"{max(sizes):.3f}")
    console = Console()
    console.print(
        f"{found.shape.family}, {found.shape.num_layers} layers: {training.num_ranks} trainer ranks "
        f"-> {rollout.num_servers} servers of {rollout.tp_size} ranks"
    )
    console.print(table)
    console.print(
        f"bytes received over bytes held: {sum(received.values()) / plan.held:.3f} (1.000: nothing sent in vain)"
    )
    console.print(
        f"between machines {between_nodes(plan.streams, plan.places) / 1e9:.3f} GB, of {plan.held / 1e9:.3f} GB held"
    )
    console.print(
        f"messages {traffic.num_messages:,}, at most {traffic.most_messages:,} to a server rank, from at most "
        f"{traffic.most_partners} trainer ranks"
    )
