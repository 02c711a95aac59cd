"""Requests that lead to further requests: trees of rollouts, and rollouts continued from points within others.

A method gives the first branches and a pure function that maps a completion to its children. The engine schedules them: the
in-process one goes level by level, servers get a branch the moment its parent is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_rl.types import Completion, Request

Key = tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """One request and its place among the others."""

    key: Key
    """Number of the prompt, then the path. Branches with the same key are generated once and shared."""
    request: Request
    tokens_to_come: int
    """Upper bound on sequential tokens from here to the end of the deepest child (scheduling priority)."""


Expand = Callable[[Branch, Completion], Sequence[Branch]]
"""Maps a completed branch to its children. A pure function: any rank may call it, in any order."""


def grow_by_level(
    seeds: Sequence[Branch], expand: Expand, generate: Callable[[Sequence[Request]], Sequence[Completion]]
) -> dict[Key, Completion]:
    """Grow a tree level by level, with one ``generate`` for each level.

    Args:
        seeds: the first level.
        expand: gives the children of a completed branch.
        generate: completes requests; if it is a collective, so is this function.

    Returns:
        The completion of every branch, in the order of ``in_order``.
    """
    grown: dict[Key, Completion] = {}
    level = _new(seeds, grown)
    while level:
        completions = generate([branch.request for branch in level])
        grown |= {branch.key: completion for branch, completion in zip(level, completions, strict=True)}
        level = _new([child for branch in level for child in expand(branch, grown[branch.key])], grown)
    return grown


def in_order(seeds: Sequence[Branch], expand: Expand, completion_of: Callable[[Branch], Completion]) -> Iterator[Key]:
    """Yield the keys of all branches, level by level: the order in which completions are sent and stored without keys.

    Args:
        seeds: the first level.
        expand: gives the children of a completed branch.
        completion_of: is called once for each branch, in this order.
    """
    seen: dict[Key, Completion] = {}
    level = _new(seeds, seen)
    while level:
        for branch in level:
            seen[branch.key] = completion_of(branch)
            yield branch.key
        level = _new([child for branch in level for child in expand(branch, seen[branch.key])], seen)


def from_list(seeds: Sequence[Branch], expand: Expand, completions: Sequence[Completion]) -> dict[Key, Completion]:
    """Give the completions of ``in_order`` their keys again.

    Raises:
        ValueError: the completions did not grow from these seeds by this function.
    """
    remaining = iter(completions)
    grown: dict[Key, Completion] = {}

    def next_one(branch: Branch) -> Completion:
        completion = next(remaining, None)
        if completion is None:
            raise ValueError(f"{len(completions)} completions are too few for what grows from {len(seeds)} seeds")
        grown[branch.key] = completion
        return completion

    for _ in in_order(seeds, expand, next_one):
        pass
    if (surplus := len(completions) - len(grown)) > 0:
        raise ValueError(f"{surplus} of {len(completions)} completions do not grow from these seeds")
    return grown


def _new(branches: Sequence[Branch], known: dict[Key, Completion]) -> list[Branch]:
    """Return the branches that are not known yet, each once."""
    return list({branch.key: branch for branch in branches if branch.key not in known}.values())
