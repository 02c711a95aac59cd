"""Trees of rollouts: values from the leaves up, and what each edge is worth (SPO-tree, arXiv 2505.23564 section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_rl.config.methods.spo import EdgeAdvantage
from megatron_rl.types import TreeNode

STD_EPSILON = 1e-8
ROUNDING = 1e-9


def set_values(node: TreeNode) -> None:
    """Set the value of every inner node: the mean of its children's, whatever the number of leaves under each (eq. 6).

    Leaves have theirs, or None where they could not be judged: those count as if they were not there.
    """
    for child in node.children:
        set_values(child)
    if node.children:
        values = [child.value for child in node.children if child.value is not None]
        if not values:
            node.value = None
        else:
            node.value = sum(values) / len(values)


@dataclass(frozen=True)
class Edge:
    """A node as seen from its parent."""

    path: tuple[TreeNode, ...]
    """Nodes from the root's child down to the parent; empty for edges of the root."""
    node: TreeNode
    advantage: float
    """0.0 where value or parent's value is not known."""


def edges(root: TreeNode, kind: EdgeAdvantage) -> Iterator[Edge]:
    """All edges of a tree whose values are set, parents first.

    Args:
        root: the prompt.
        kind: of advantage. ``raw``: V(node) - V(parent). ``std``: that over the standard deviation of the siblings' values, of
            all b of them (divided by b, not b - 1), as in the released code; 1e-8 is added. ``leave_one_out``: V(node) less the
            mean of its siblings without it, b / (b - 1) times ``raw`` (what the released code calls rloo is ``raw``).
    """
    waiting: list[tuple[tuple[TreeNode, ...], TreeNode]] = [((), root)]
    while waiting:
        path, parent = waiting.pop(0)
        scale = _scale(parent, kind)
        for child in parent.children:
            difference = 0.0 if child.value is None or parent.value is None else child.value - parent.value
            # What the rounding of a mean leaves is no advantage.
            yield Edge(path, child, difference * scale if abs(difference) > ROUNDING else 0.0)
            waiting.append(((*path, child), child))


def _scale(parent: TreeNode, kind: EdgeAdvantage) -> float:
    values = [child.value for child in parent.children if child.value is not None]
    if kind == "raw":
        return 1.0
    if len(values) < 2:  # an only child is its parent's value: there is nothing to scale
        return 0.0
    if kind == "leave_one_out":
        return len(values) / (len(values) - 1)
    return 1 / (float(torch.tensor(values, dtype=torch.float64).std(unbiased=False)) + STD_EPSILON)
