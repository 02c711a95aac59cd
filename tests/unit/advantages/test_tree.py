"""Values and edges of trees: the example of the paper's code worked out by hand, and any tree against brute force."""

from __future__ import annotations

import random
import statistics

import pytest

from megatron_rl.advantages.tree import edges, set_values
from megatron_rl.types import TreeNode


def leaf(value: float | None) -> TreeNode:
    return TreeNode(None, [], value=value)


def inner(*children: TreeNode) -> TreeNode:
    return TreeNode(None, list(children))


def advantages(root: TreeNode, kind: str = "raw") -> list[float]:
    set_values(root)
    return [edge.advantage for edge in edges(root, kind)]  # type: ignore[arg-type]


def test_the_worked_example() -> None:
    root = inner(inner(leaf(1), leaf(0)), inner(leaf(0), leaf(0)))
    assert advantages(root) == [0.25, -0.25, 0.5, -0.5, 0, 0]
    assert root.value == 0.25
    assert [child.value for child in root.children] == [0.5, 0]


def test_other_scales() -> None:
    def root() -> TreeNode:
        return inner(leaf(1), leaf(0), leaf(0), leaf(0))

    assert advantages(root(), "leave_one_out") == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    root_3 = 3**0.5  # differences 3/4 and -1/4 over a standard deviation of sqrt(3)/4
    assert advantages(root(), "std") == pytest.approx([root_3, -1 / root_3, -1 / root_3, -1 / root_3])
    assert advantages(inner(leaf(1), leaf(0)), "std") == pytest.approx([1, -1])
    assert advantages(inner(leaf(1), leaf(1)), "std") == [0, 0]


def test_an_only_child_teaches_nothing() -> None:
    for kind in ("raw", "std", "leave_one_out"):
        assert advantages(inner(leaf(1)), kind) == [0]


def test_equal_children_are_worth_nothing_to_the_bit() -> None:
    """Six times a fifth, over six, is not a fifth in floating point."""
    assert sum([0.2] * 6) / 6 != 0.2
    fifths = [inner(leaf(1), leaf(0), leaf(0), leaf(0), leaf(0)) for _ in range(6)]
    assert advantages(inner(*fifths))[:6] == [0] * 6


def test_a_child_that_is_worth_the_mean_is_worth_nothing() -> None:
    """Also where the mean is off by the last bit, as this one is before Python 3.12."""
    values = [0, 3 / 6, 4 / 6, 4 / 6, 4 / 6]
    for kind in ("raw", "std", "leave_one_out"):
        assert [a == 0 for a in advantages(inner(*map(leaf, values)), kind)] == [False, True, False, False, False]


def test_an_early_leaf_counts_as_much_as_a_subtree() -> None:
    root = inner(leaf(1), inner(leaf(0), leaf(0), leaf(1)))
    set_values(root)
    assert root.value == pytest.approx((1 + 1 / 3) / 2)


def test_what_could_not_be_judged_is_as_if_it_were_not_there() -> None:
    root = inner(inner(leaf(1), leaf(None)), inner(leaf(None), leaf(None)), leaf(0))
    assert advantages(root) == [0.5, 0, -0.5, 0, 0, 0, 0]
    assert advantages(root, "leave_one_out") == [1.0, 0, -1.0, 0, 0, 0, 0]
    assert advantages(inner(leaf(None))) == [0]


@pytest.mark.parametrize("seed", range(20))
def test_any_tree_against_brute_force(seed: int) -> None:
    draw = random.Random(seed)

    def grow(depth: int) -> TreeNode:
        if depth == 0 or draw.random() < 0.3:
            return leaf(draw.choice([0.0, 1.0]))
        return inner(*(grow(depth - 1) for _ in range(draw.randint(2, 5))))

    def value(node: TreeNode) -> float:
        return statistics.fmean(map(value, node.children)) if node.children else node.value  # type: ignore[return-value]

    root = inner(*(grow(3) for _ in range(3)))
    set_values(root)
    found = list(edges(root, "raw"))
    waiting = [root]
    count = 0
    while waiting:
        node = waiting.pop()
        assert node.value == pytest.approx(value(node))
        assert sum(e.advantage for e in found if any(e.node is c for c in node.children)) == pytest.approx(0, abs=1e-9)
        waiting += node.children
        count += len(node.children)
    assert count == len(found)
    for edge in found:
        parent = edge.path[-1] if edge.path else root
        assert any(edge.node is child for child in parent.children)
        assert edge.advantage == pytest.approx(value(edge.node) - value(parent))
