"""Requests that lead to further requests: trees of rollouts, and rollouts continued from places within others.

A method says what it starts with and, by a pure function, what follows from each completion. Who generates what when is the
engine's affair: the in-process one goes level by level, servers get a branch the moment its parent is complete.
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
    """Begins with the number of the prompt. Equal keys are one branch: what several places lead to is generated once."""
    request: Request
    tokens_to_come: int
    """At most so many are still generated one after another from here on, this request's own included."""


Expand = Callable[[Branch, Completion], Sequence[Branch]]
"""What follows from a completed branch. A pure function: every rank may ask it, in any order."""


def grow_by_level(
    seeds: Sequence[Branch], expand: Expand, generate: Callable[[Sequence[Request]], Sequence[Completion]]
) -> dict[Key, Completion]:
    """All that grows from the seeds, a ``generate`` for each level.

    Args:
        seeds: the first level.
        expand: what follows.
        generate: completes requests; a collective, if this is one.

    Returns:
        Every branch's completion, in the order of ``in_order``.
    """
    grown: dict[Key, Completion] = {}
    level = _new(seeds, grown)
    while level:
        completions = generate([branch.request for branch in level])
        grown |= {branch.key: completion for branch, completion in zip(level, completions, strict=True)}
        level = _new([child for branch in level for child in expand(branch, grown[branch.key])], grown)
    return grown


def in_order(seeds: Sequence[Branch], expand: Expand, completion_of: Callable[[Branch], Completion]) -> Iterator[Key]:
    """The keys of all branches, level by level: the order in which completions are sent and stored without their keys.

    Args:
        seeds: the first level.
        expand: what follows.
        completion_of: is asked for each branch once, in this order.
    """
    seen: dict[Key, Completion] = {}
    level = _new(seeds, seen)
    while level:
        for branch in level:
            seen[branch.key] = completion_of(branch)
            yield branch.key
        level = _new([child for branch in level for child in expand(branch, seen[branch.key])], seen)


def from_list(seeds: Sequence[Branch], expand: Expand, completions: Sequence[Completion]) -> dict[Key, Completion]:
    """The completions of ``in_order`` with their keys again.

    Raises:
        ValueError: these did not grow from these seeds by this function.
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
    """Those that are not known, each once."""
    return list({branch.key: branch for branch in branches if branch.key not in known}.values())
