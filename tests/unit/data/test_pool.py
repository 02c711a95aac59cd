"""Pools of trajectories: what comes back, what a crash leaves, and that damage is found."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from megatron_rl.data.pool import Pool, PoolWriter, Provenance, Trajectory, merge
from megatron_rl.errors import UserError

ORIGIN = Provenance("word_problems", "aaaa", "bbbb", {"temperature": 1.0})


def trajectory(number: int) -> Trajectory:
    generator = random.Random(number)
    length = generator.randrange(1, 30)
    return Trajectory(
        problem_id=f"problem {number} \u00e9",
        prompt_ids=torch.tensor(
            [generator.randrange(150_000) for _ in range(generator.randrange(0, 9))], dtype=torch.int64
        ),
        response_ids=torch.tensor([generator.randrange(150_000) for _ in range(length)]),
        reward=generator.random(),
        response_mask=None if number % 3 else torch.tensor([i % 4 != 1 for i in range(length)]) if length > 1 else None,
        ref_log_probs=None if number % 5 == 0 else -torch.rand(length, generator=torch.Generator().manual_seed(number)),
    )


def same(one: Trajectory, other: Trajectory) -> bool:
    def equal(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return a == pytest.approx(b) if isinstance(a, float) else a == b

    return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Trajectory))


def build(directory: Path, numbers: range, *, origin: Provenance = ORIGIN, shard_rows: int = 20) -> Path:
    with PoolWriter(directory, origin, shard_rows=shard_rows) as writer:
        for number in numbers:
            writer.add(trajectory(number))
    return directory


def test_what_was_added_comes_back_in_order_over_shards_and_sessions(tmp_path: Path) -> None:
    build(tmp_path / "pool", range(50))
    build(tmp_path / "pool", range(50, 73))
    pool = Pool(tmp_path / "pool")
    assert len(pool) == 73 and len(list((tmp_path / "pool").iterdir())) == 5
    assert all(same(pool[number], trajectory(number)) for number in range(73))
    assert same(pool[-1], trajectory(72)) and len(pool[10:20]) == 10
    assert pool.rewards().tolist() == pytest.approx([trajectory(n).reward for n in range(73)])
    assert pool.response_lengths().tolist() == [len(trajectory(n).response_ids) for n in range(73)]
    assert list(pool.verify()) == list(range(73)) and pool.provenance == ORIGIN
    with pytest.raises(IndexError):
        pool[73]


def test_a_writer_that_fails_leaves_the_finished_shards(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), PoolWriter(tmp_path / "pool", ORIGIN, shard_rows=20) as writer:
        for number in range(45):
            writer.add(trajectory(number))
        raise RuntimeError("planted")
    assert len(Pool(tmp_path / "pool")) == 40
    build(tmp_path / "pool", range(40, 50))
    assert same(Pool(tmp_path / "pool")[49], trajectory(49))


def test_what_a_killed_writer_left_is_no_part_of_the_pool(tmp_path: Path) -> None:
    writer = PoolWriter(tmp_path / "pool", ORIGIN, shard_rows=20)
    for number in range(25):
        writer.add(trajectory(number))
    assert len(Pool(tmp_path / "pool")) == 20  # five are in a shard without a name
    build(tmp_path / "pool", range(20, 30))
    assert len(Pool(tmp_path / "pool")) == 30


@pytest.mark.parametrize("file", ["response_ids", "prompt_ids", "ref_log_probs", "response_mask", "texts", "rows"])
def test_every_flipped_bit_is_found_when_its_trajectory_is_read(tmp_path: Path, file: str) -> None:
    path = build(tmp_path / "pool", range(20)) / "shard_000000" / f"{file}.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    pool = Pool(tmp_path / "pool")
    with pytest.raises(UserError, match="shard_000000"):
        list(pool.verify())


def test_a_shard_that_was_cut_off_is_refused_at_once(tmp_path: Path) -> None:
    path = build(tmp_path / "pool", range(45)) / "shard_000001" / "response_ids.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"response_ids\.bin.*manifest says"):
        Pool(tmp_path / "pool")
    path.unlink()
    with pytest.raises(UserError, match="has None bytes"):
        Pool(tmp_path / "pool")


@pytest.mark.parametrize("field", ["model_digest", "tokenizer_digest"])
def test_pools_of_another_model_or_tokenizer_are_refused(tmp_path: Path, field: str) -> None:
    other = dataclasses.replace(ORIGIN, **{field: "cccc"})
    build(tmp_path / "pool", range(5))
    with pytest.raises(UserError, match=f"another {field.removesuffix('_digest')}"):
        Pool(tmp_path / "pool", expected=other)
    with pytest.raises(UserError, match="another"):
        PoolWriter(tmp_path / "pool", other)
    build(tmp_path / "other", range(5), origin=other)
    with pytest.raises(UserError, match="another"):
        merge([tmp_path / "pool", tmp_path / "other"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_pools_are_merged_in_order(tmp_path: Path) -> None:
    build(tmp_path / "one", range(7))
    build(tmp_path / "two", range(7, 12))
    assert merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both") == 12
    assert all(same(row, trajectory(number)) for number, row in enumerate(Pool(tmp_path / "both")))


def test_no_pool_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished shard"):
        Pool(tmp_path / "nothing")
