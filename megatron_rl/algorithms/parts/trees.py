"""TreeRollouts: a tree of rollouts for each prompt, its values, and its edges as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.advantages.tree import edges, set_values
from megatron_rl.algorithms.parts.base import Rollouts, TokenSelection
from megatron_rl.algorithms.parts.rows import RowMaker
from megatron_rl.config import Config
from megatron_rl.config.methods.spo import SPOTreeConfig
from megatron_rl.data.edges import EdgeStore
from megatron_rl.data.stream import Stream
from megatron_rl.report.tree_record import record_step
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.growth import Branch, Key
from megatron_rl.types import Completion, Prompt, Rollout, RolloutGroup, RowKind, TrainingSample, TreeNode


class TreeRollouts(Rollouts):
    """Trees whose node values are averaged up from the leaves; their edges wait in a store until they are trained on."""

    takes_stored = False

    def __init__(self, config: Config, selection: TokenSelection) -> None:
        super().__init__()
        assert isinstance(config.algorithm, SPOTreeConfig)
        self.config, self.settings, self.make = config, config.algorithm, RowMaker(config)
        self.selection = selection
        settings = self.settings
        self.store = EdgeStore(
            settings.edge_lifetime_steps,
            settings.max_edges_per_tree,
            max_waiting=settings.max_waiting_edges_per_step,
            origin=f"temperature {config.rollout.temperature}, {settings.advantage} advantages",
        )
        self.num_used = 0
        """Edges that the last step trains on: the first of its rows; those after them wait for later steps."""

    def collect(self, prompts: Stream[Prompt], collector: Collector, step: int) -> list[RolloutGroup]:
        """A tree for each prompt, with the values of all its nodes."""
        chosen = prompts.take(self.settings.num_prompts_per_step)
        draw, sampling = f"train/{step}", self.make.sampling()
        factors, length = self.settings.branch_factors, self.settings.tokens_per_level
        limit = self.config.rollout.max_new_tokens

        def children(key: Key, context: Tensor) -> list[Branch]:
            """Return the children of a node; its key is (prompt, number of the child, of that one's child, ...)."""
            level = len(key) - 1
            remaining = limit - (len(context) - len(chosen[key[0]].prompt_ids))
            if level == len(factors) or remaining == 0:
                return []
            most = remaining if level == len(factors) - 1 else min(length, remaining)
            places = [(*key, number) for number in range(factors[level])]
            return [
                Branch(place, collector.request(context, sampling, most, f"{draw}/{place}"), tokens_to_come=remaining)
                for place in places
            ]

        def expand(branch: Branch, completion: Completion) -> Sequence[Branch]:
            if completion.finish_reason != "length":
                return ()
            return children(branch.key, torch.cat([branch.request.prompt_ids, completion.response_ids]))

        seeds = [branch for i, prompt in enumerate(chosen) for branch in children((i,), prompt.prompt_ids)]
        grown = collector.grow(seeds, expand)
        nodes: dict[Key, TreeNode] = {(i,): TreeNode(None, []) for i in range(len(chosen))}
        nodes |= {key: TreeNode(completion, []) for key, completion in grown.items()}
        for key in sorted(grown):
            nodes[key[:-1]].children.append(nodes[key])
        for key, node in nodes.items():  # a missing child would bias its parent's mean, so fail loudly
            assert len(node.children) in (0, factors[min(len(key), len(factors)) - 1]), f"{key} has lost children"
        return self._judged(chosen, nodes, collector)

    def _judged(
        self, prompts: Sequence[Prompt], nodes: dict[Key, TreeNode], collector: Collector
    ) -> list[RolloutGroup]:
        """Score the leaves, and set all values."""
        leaves = [key for key, node in nodes.items() if len(key) > 1 and not node.children]
        responses = [_path([nodes[key[:n]] for n in range(2, len(key) + 1)]) for key in leaves]
        scores = collector.score([prompts[key[0]] for key in leaves], responses)
        groups = [RolloutGroup(prompt, [], nodes[(i,)]) for i, prompt in enumerate(prompts)]
        for key, response, score in zip(leaves, responses, scores):
            node = nodes[key]
            node.score = score
            node.value = None if score.is_failure else self.make.shaped(score.reward, len(response.response_ids))
            groups[key[0]].rollouts.append(Rollout(response, score))
        for group in groups:
            assert group.tree is not None
            set_values(group.tree)
        known = [group.tree.value for group in groups if group.tree is not None and group.tree.value is not None]
        self.metrics = {
            "spo/nodes_per_tree": (len(nodes) - len(groups)) / len(groups),
            "spo/leaves_per_tree": len(leaves) / len(groups),
            "spo/early_leaves_frac": sum(len(key) <= len(self.settings.branch_factors) for key in leaves) / len(leaves),
            "spo/value_mean": sum(known) / len(known) if known else 0.0,
        }
        return groups

    # ---- rows

    def rows(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """The edges to train on in this step, and after them those of its trees that are kept for later."""
        trees = [self._edges_of(group) for group in groups]
        num_edges = sum(_num_nodes(group.tree) for group in groups if group.tree is not None)
        fresh = {id(row) for tree in trees for row in tree}
        self.store.add(trees, step)
        used = self.store.draw(
            self.settings.num_edges_per_step,
            seed=self.config.trainer.seed,
            step=step,
            batch_size=self.config.policy.train_global_batch_size,
            multiple=self.config.row_unit,
        )
        self.num_used = len(used)
        self.metrics |= {
            "spo/edges_with_advantage_frac": len(fresh) / num_edges,
            "spo/edges_used": float(len(used)),
            "spo/edges_fresh_frac": sum(id(row) in fresh for row in used) / len(used) if used else 0.0,
            "spo/edges_staleness": sum(step - row.weight_version for row in used) / len(used) if used else 0.0,
            "spo/edges_kept": float(len(self.store)),
            "spo/edges_expired": float(self.store.num_expired),
        }
        return [*used, *self.store.born_in(step)]

    def _edges_of(self, group: RolloutGroup) -> list[TrainingSample]:
        """A row for each edge that is worth something."""
        assert group.tree is not None
        rows = []
        contexts: dict[int, Tensor] = {}
        for edge in edges(group.tree, self.settings.advantage):
            completion = edge.node.completion
            if edge.advantage == 0 or completion is None:
                continue
            parent = id(edge.path[-1]) if edge.path else 0
            if parent not in contexts:  # siblings share it
                path = [node.completion.response_ids for node in edge.path if node.completion is not None]
                contexts[parent] = torch.cat([group.prompt.prompt_ids, *path])
            rows.append(
                self.make.of_completion(
                    completion,
                    contexts[parent],
                    RowKind.EDGE,
                    reward=edge.node.value or 0.0,
                    advantages=torch.full((len(completion.response_ids),), edge.advantage),
                    loss_mask=self.selection.mask_of(completion.log_probs),
                )
            )
        return rows

    # ---- around a step

    def keep(self, directory: Path, groups: Sequence[RolloutGroup], tokenizer: Any, *, step: int) -> None:
        """Write the trees of every n-th step, for ``megatron-rl view``."""
        record_step(
            directory, groups, tokenizer, self.settings, step=step, shaped=self.make.shaped,
            advantage=self.settings.advantage,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Return the edges that are kept for later."""
        return self.store.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the edges kept before."""
        self.store.load_state(state)


def _path(nodes: Sequence[TreeNode]) -> Completion:
    """Join the pieces from the prompt to a leaf into one response."""
    pieces = [node.completion for node in nodes if node.completion is not None]
    return Completion(
        torch.cat([piece.response_ids for piece in pieces]),
        torch.cat([piece.log_probs for piece in pieces]),
        pieces[-1].finish_reason,
        min(piece.weight_version for piece in pieces),
    )


def _num_nodes(root: TreeNode) -> int:
    return sum(1 + _num_nodes(child) for child in root.children)
