"""Tree edges that wait to be trained on: a tree yields more of them than one update needs (SPO-tree's replay)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.errors import UserError
from megatron_rl.types import FINISH_REASONS, RowKind, TrainingSample


@dataclass
class _Tree:
    born: int
    """Step that grew the tree."""
    rows: list[TrainingSample]


class EdgeStore:
    """The newest trees' edges, in memory, the same on every rank."""

    def __init__(
        self, lifetime_steps: int, max_per_tree: int, *, max_waiting: int | None = None, origin: str = ""
    ) -> None:
        """Make an empty store.

        Args:
            lifetime_steps: a tree of step s is drawn from in steps s to s + lifetime_steps - 1.
            max_per_tree: edges of one tree in one draw.
            max_waiting: edges of one step's trees that stay for later; None keeps all.
            origin: what log-probs and advantages of edges depend on; those of another origin do not go on with this run.
        """
        self._lifetime_steps, self._max_per_tree = lifetime_steps, max_per_tree
        self._max_waiting, self._origin = 0 if lifetime_steps == 1 else max_waiting, origin
        self._trees: list[_Tree] = []
        self.num_expired = 0
        """Number of edges that the last ``add`` dropped for their age, and that a resume before it did not take."""
        self._num_foreign = 0

    def __len__(self) -> int:
        return sum(len(tree.rows) for tree in self._trees)

    def add(self, trees: Sequence[Sequence[TrainingSample]], step: int) -> None:
        """Add the edges of this step's trees, and drop those that are too old."""
        is_alive = [tree.born > step - self._lifetime_steps for tree in self._trees]
        too_old = sum(len(tree.rows) for tree, alive in zip(self._trees, is_alive) if not alive)
        self.num_expired, self._num_foreign = too_old + self._num_foreign, 0
        self._trees = [tree for tree, alive in zip(self._trees, is_alive) if alive and tree.rows]
        self._trees += [_Tree(step, list(rows)) for rows in trees if rows]

    def draw(self, count: int, *, seed: int, step: int, batch_size: int, multiple: int) -> list[TrainingSample]:
        """Remove and return up to ``count`` edges, each as likely as any other within the limit of one tree.

        Args:
            count: at most so many, a multiple of ``batch_size``.
            seed: with ``step``, of the random order.
            step: of the run.
            batch_size: of an optimizer update. The number drawn is a multiple of it, unless there is not even one batch: an
                update on a few left over would be whitened among themselves.
            multiple: what ``batch_size`` is a multiple of; fewer than one batch are a multiple of this, so that ranks get
                equally many.
        """
        order = [(tree, row) for tree, kept in enumerate(self._trees) for row in range(len(kept.rows))]
        random.Random(f"{seed}/edges/{step}").shuffle(order)
        given = [0] * len(self._trees)
        drawn: list[tuple[int, int]] = []
        for tree, row in order:
            if len(drawn) < count and given[tree] < self._max_per_tree:
                given[tree] += 1
                drawn.append((tree, row))
        unit = batch_size if len(drawn) >= batch_size else multiple
        drawn = drawn[: len(drawn) // unit * unit]
        rows = [self._trees[tree].rows[row] for tree, row in drawn]
        gone = set(drawn)
        fresh = [place for place in order if place not in gone and self._trees[place[0]].born == step]
        if self._max_waiting is not None:
            gone |= set(fresh[self._max_waiting :])
        for tree, kept in enumerate(self._trees):
            kept.rows = [row for number, row in enumerate(kept.rows) if (tree, number) not in gone]
        return rows

    def born_in(self, step: int) -> list[TrainingSample]:
        """Return the edges of this step's trees that stay."""
        return [row for tree in self._trees if tree.born == step for row in tree.rows]

    def state(self) -> dict[str, Tensor]:
        """Return the state in few tensors. Experts of a routing replay are not kept: waiting edges are refused there."""
        rows = [row for tree in self._trees for row in tree.rows]
        masks = [torch.ones(len(r.response_ids)) if r.loss_mask is None else r.loss_mask for r in rows]

        def joined(name: str, dtype: torch.dtype) -> Tensor:
            return torch.cat([torch.empty(0, dtype=dtype), *(getattr(row, name).to(dtype) for row in rows)])

        state = {
            "origin": torch.tensor(list(self._origin.encode()), dtype=torch.uint8),
            "born": torch.tensor([tree.born for tree in self._trees], dtype=torch.int64),
            "num_edges": torch.tensor([len(tree.rows) for tree in self._trees], dtype=torch.int64),
            "sizes": torch.tensor([(len(row.prompt_ids), len(row.response_ids)) for row in rows]).reshape(-1, 2),
            "weight_versions": torch.tensor([row.weight_version for row in rows], dtype=torch.int64),
            "finish_reasons": torch.tensor([FINISH_REASONS.index(row.finish_reason) for row in rows]).long(),
            "rewards": torch.tensor([row.reward for row in rows], dtype=torch.float64),
            "prompt_ids": joined("prompt_ids", torch.int32),
            "response_ids": joined("response_ids", torch.int32),
        }
        state |= {name: joined(name, torch.float32) for name in ("advantages", "old_log_probs", "rollout_log_probs")}
        if any(row.loss_mask is not None for row in rows):
            state["loss_mask"] = torch.cat(masks).to(torch.uint8)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state``; without one, or from another origin, nothing is kept.

        Raises:
            UserError: it is of another algorithm.
        """
        self._trees = []
        if not state:
            return
        if "num_edges" not in state:
            raise UserError(
                "algorithm.name",
                "spo_tree",
                "cannot go on with what another algorithm has kept in this run's checkpoint",
                "give the run another exp_manager.name, and start it from the exported weights",
            )
        if bytes(state["origin"].tolist()) != self._origin.encode():
            self._num_foreign = int(state["num_edges"].sum())
            return
        prompt_sizes, sizes = state["sizes"].T.tolist()
        prompts = state["prompt_ids"].long().split(prompt_sizes)
        responses = state["response_ids"].long().split(sizes)
        vectors = {
            name: state[name].split(sizes)
            for name in ("advantages", "old_log_probs", "rollout_log_probs", "loss_mask")
            if name in state
        }
        rows = iter(
            [
                TrainingSample(
                    prompt_ids=prompts[row].clone(),
                    response_ids=responses[row].clone(),
                    kind=RowKind.EDGE,
                    reward=float(state["rewards"][row]),
                    finish_reason=FINISH_REASONS[int(state["finish_reasons"][row])],
                    weight_version=int(state["weight_versions"][row]),
                    **{
                        name: values[row].bool() if name == "loss_mask" else values[row].clone()
                        for name, values in vectors.items()
                    },
                )
                for row in range(len(sizes))
            ]
        )
        for born, count in zip(state["born"].tolist(), state["num_edges"].tolist(), strict=True):
            self._trees.append(_Tree(born, [next(rows) for _ in range(count)]))
