"""Edges that wait: each is trained on once or expires, a tree gives so many at most, and a checkpoint keeps them all."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.data.edges import EdgeStore
from megatron_rl.errors import UserError
from megatron_rl.types import RowKind, TrainingSample


def rows(tree: int, count: int, *, masked: bool = True) -> list[TrainingSample]:
    made = []
    for number in range(count):
        size = 1 + (tree + number) % 4
        made.append(
            TrainingSample(
                torch.arange(2 + number % 3),
                torch.full((size,), 100 * tree + number),
                RowKind.EDGE,
                reward=0.1 * number,
                finish_reason="length" if number % 2 else "stop",
                weight_version=tree,
                rollout_log_probs=-torch.rand(size),
                old_log_probs=-torch.rand(size),
                advantages=torch.full((size,), 0.5),
                loss_mask=torch.rand(size) < 0.5 if masked else None,
            )
        )
    return made


def numbers(drawn: list[TrainingSample]) -> list[int]:
    return [int(row.response_ids[0]) for row in drawn]


def test_every_edge_once_and_a_tree_gives_so_many() -> None:
    store = EdgeStore(lifetime_steps=8, max_per_tree=3)
    store.add([rows(1, 8), rows(2, 2), []], step=0)
    seen: list[int] = []
    for step, expected in enumerate((5, 3, 2, 0)):
        drawn = numbers(store.draw(10, seed=1, step=step, batch_size=1, multiple=1))
        assert len(drawn) == expected
        assert sum(number < 200 for number in drawn) <= 3
        seen += drawn
        store.add([], step=step + 1)
    assert sorted(seen) == [*range(100, 108), 200, 201]
    assert len(store) == 0


def test_edges_expire() -> None:
    store = EdgeStore(lifetime_steps=2, max_per_tree=100)
    store.add([rows(1, 4)], step=5)
    store.add([rows(2, 3)], step=6)
    assert (len(store), store.num_expired) == (7, 0)
    store.add([], step=7)
    assert (len(store), store.num_expired) == (3, 4)
    store.add([], step=8)
    assert (len(store), store.num_expired) == (0, 3)


def test_whole_batches_or_less_than_one_shared_out_evenly() -> None:
    store = EdgeStore(lifetime_steps=8, max_per_tree=100)
    store.add([rows(1, 27)], step=0)
    assert len(store.draw(100, seed=1, step=1, batch_size=8, multiple=2)) == 24
    assert len(store.draw(100, seed=1, step=2, batch_size=8, multiple=2)) == 2
    assert store.draw(100, seed=1, step=3, batch_size=8, multiple=2) == []
    assert len(store) == 1


def test_as_many_wait_as_may() -> None:
    for lifetime, most, waiting in ((1, None, 0), (2, None, 30), (2, 12, 12), (2, 50, 30)):
        store = EdgeStore(lifetime_steps=lifetime, max_per_tree=100, max_waiting=most)
        store.add([rows(1, 20), rows(2, 20)], step=3)
        drawn = store.draw(10, seed=1, step=3, batch_size=5, multiple=1)
        assert len(drawn) == 10 and len(store) == waiting
        stay = store.born_in(3)
        assert len(stay) == waiting and not set(numbers(stay)) & set(numbers(drawn))
        assert store.born_in(2) == []


def test_a_store_with_and_without_masks_is_kept_whole() -> None:
    """As after a resume with another selection.max_probability: no mask is a mask of ones."""
    store, other = EdgeStore(8, 100), EdgeStore(8, 100)
    store.add([rows(1, 3, masked=False), rows(2, 3)], step=0)
    other.load_state(store.state())
    for row, copy in zip(store.born_in(0), other.born_in(0), strict=True):
        expected = torch.ones(len(row.response_ids), dtype=torch.bool) if row.loss_mask is None else row.loss_mask
        assert torch.equal(copy.loss_mask, expected)


def test_what_another_algorithm_kept_is_refused() -> None:
    with pytest.raises(UserError, match="another algorithm"):
        EdgeStore(8, 100).load_state({"num_successes": torch.zeros(1)})


def test_edges_of_another_temperature_do_not_go_on() -> None:
    store = EdgeStore(8, 100, origin="temperature 0.6")
    store.add([rows(1, 7)], step=4)
    same, other = EdgeStore(8, 100, origin="temperature 0.6"), EdgeStore(8, 100, origin="temperature 1.0")
    for resumed in (same, other):
        resumed.load_state(store.state())
        resumed.add([], step=5)
    assert (len(same), same.num_expired) == (7, 0)
    assert (len(other), other.num_expired) == (0, 7)
    other.add([], step=6)
    assert other.num_expired == 0


def test_the_draw_depends_on_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> list[int]:
        store = EdgeStore(lifetime_steps=8, max_per_tree=100)
        store.add([rows(1, 40)], step=0)
        return numbers(store.draw(10, seed=seed, step=step, batch_size=1, multiple=1))

    assert drawn(1, 0) == drawn(1, 0)
    assert drawn(1, 0) != drawn(2, 0)
    assert drawn(1, 0) != drawn(1, 1)


def test_a_checkpoint_keeps_all_of_it() -> None:
    for masked in (True, False):
        store, other = EdgeStore(3, 5), EdgeStore(3, 5)
        store.add([rows(1, 6, masked=masked), rows(2, 3, masked=masked)], step=4)
        store.add([rows(3, 2, masked=masked)], step=5)
        state = {name: tensor.clone() for name, tensor in store.state().items()}
        other.load_state(state)
        for step in (6, 7):
            mine, theirs = (s.draw(5, seed=3, step=step, batch_size=2, multiple=2) for s in (store, other))
            assert len(mine) == len(theirs) == 4
            for row, copy in zip(mine, theirs):
                for name, value in vars(row).items():
                    found = getattr(copy, name)
                    assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, name
            for s in (store, other):
                s.add([], step=step)
            assert store.num_expired == other.num_expired


def test_an_empty_store_has_a_state() -> None:
    store = EdgeStore(3, 5)
    store.load_state(EdgeStore(3, 5).state())
    store.load_state({})
    assert len(store) == 0
