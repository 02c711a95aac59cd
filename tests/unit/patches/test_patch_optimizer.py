"""Torch's Adam inside the distributed optimizer: saved before its first step, and resumed without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from tests.forked import run_ranks
from tests.tiny_gpt import forward_backward, init_parallel, make_config, make_model, make_optimizer, wrap


class Trainer:
    """Two data-parallel ranks that train, save and load."""

    def __init__(self) -> None:
        config = make_config(num_layers=1)
        init_parallel(config)
        self.model = wrap(make_model(config))
        self.optimizer = make_optimizer(self.model)
        self.metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        }

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(forward_backward(self.model, seed=step))
            self.optimizer.step()
        return losses

    def state(self, is_loading: bool) -> dict[str, Any]:
        model = self.model.module.sharded_state_dict(metadata=self.metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=self.metadata)
        return {"model": model, "optimizer": optimizer}

    def load(self, directory: Path) -> None:
        state = dist_checkpointing.load(self.state(is_loading=True), str(directory))
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def steps(self) -> list[torch.Tensor]:
        [inner] = [chained.optimizer for chained in self.optimizer.chained_optimizers]
        return [state["step"] for state in inner.state.values()]


def train_and_save(directory: Path, steps: int) -> list[float]:
    trainer = Trainer()
    trainer.train(range(steps))
    dist_checkpointing.save(trainer.state(is_loading=False), str(directory))
    return trainer.train(range(steps, steps + 3))


def load_and_train(directory: Path, steps: int) -> tuple[list[float], list[float], int, list[float]]:
    trainer = Trainer()
    for parameter in trainer.model.module.parameters():
        parameter.data.fill_(7.0)  # what is not loaded shows
    trainer.load(directory)
    loaded = trainer.steps()
    counts, num_distinct = [step.item() for step in loaded], len({step.data_ptr() for step in loaded})
    losses = trainer.train(range(steps, steps + 3))
    assert num_distinct == len(loaded), f"{len(loaded)} parameters share {num_distinct} step tensors"
    return losses, counts, dist.get_rank(), [step.item() for step in trainer.steps()]


def check(directory: Path, steps: int) -> None:
    uninterrupted = run_ranks(train_and_save, 2, directory, steps)
    for losses, before, rank, after in run_ranks(load_and_train, 2, directory, steps):
        assert losses == uninterrupted[rank]
        assert set(before) == {float(steps)}
        assert set(after) == {float(steps + 3)}


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    check(tmp_path, steps=2)


def test_fresh_optimizer_can_be_saved(tmp_path: Path) -> None:
    check(tmp_path, steps=0)
