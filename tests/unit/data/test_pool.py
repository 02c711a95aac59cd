"""Pools of trajectories: what comes back, what a crash leaves, and that damage is found."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.data.pool import (
    Pool,
    PoolWriter,
    Provenance,
    Trajectory,
    drop_shards_after,
    filter_pool,
    merge,
    num_shards,
)
from megatron_rl.data.shard import _with_checksum
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


def test_rows_are_taken_in_the_order_asked_for_from_all_shards(tmp_path: Path) -> None:
    pool = Pool(build(tmp_path / "pool", range(50)))
    for numbers in ([49, 0, 20, 0, -1, 19], np.array([3, 45]), range(40, 10, -7), []):
        taken = pool.take(numbers)
        assert len(taken) == len(numbers)
        assert all(same(row, trajectory(int(number) % 50)) for row, number in zip(taken, numbers))
    for number in (50, -51):
        with pytest.raises(IndexError):
            pool.take([0, number])


def test_lengths_and_log_probs_are_known_without_reading(tmp_path: Path) -> None:
    pool = Pool(build(tmp_path / "pool", range(30)))
    assert pool.prompt_lengths().tolist() == [len(trajectory(n).prompt_ids) for n in range(30)]
    assert pool.has_ref_log_probs().tolist() == [n % 5 != 0 for n in range(30)]


def test_rows_of_each_problem(tmp_path: Path) -> None:
    names = ["b", "a", "b", "c", "a", "b", "", "c"]
    with PoolWriter(tmp_path / "pool", ORIGIN, shard_rows=3) as writer:
        for name in names:
            writer.add(dataclasses.replace(trajectory(1), problem_id=name))
    found = Pool(tmp_path / "pool").rows_of_problems()
    assert list(found.items()) == [("b", [0, 2, 5]), ("a", [1, 4]), ("c", [3, 7]), ("", [6])]


@pytest.mark.parametrize("file", ["rows", "data"])
def test_every_flipped_bit_is_found_when_its_trajectory_is_read(tmp_path: Path, file: str) -> None:
    path = build(tmp_path / "pool", range(3)) / "shard_000000" / f"{file}.bin"
    good = path.read_bytes()
    whole = [trajectory(number) for number in range(3)]
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        pool = Pool(tmp_path / "pool")
        damaged = []
        for number in range(3):
            try:
                assert same(pool[number], whole[number])
            except UserError as error:
                assert f"row {number} of the pool" in str(error) and "shard_000000" in str(error)
                damaged.append(number)
        assert len(damaged) == 1
        assert damaged == ([place // 40] if file == "rows" else damaged)
        with pytest.raises(UserError, match=f"row {damaged[0]} of the pool"):
            list(pool.verify())


def test_a_shard_that_was_cut_off_is_refused_at_once(tmp_path: Path) -> None:
    for file in ("data", "rows"):
        path = build(tmp_path / file, range(45)) / "shard_000001" / f"{file}.bin"
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(UserError, match=rf"{file}\.bin.*manifest says"):
            Pool(tmp_path / file)
        path.unlink()
        with pytest.raises(UserError, match="has None bytes"):
            Pool(tmp_path / file)


def test_a_shard_with_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "pool", range(5)) / "shard_000000" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_bytes(_with_checksum(manifest | {"num_rows": 4}))
    with pytest.raises(UserError, match="the manifest says 4 rows"):
        Pool(tmp_path / "pool")


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    path = build(tmp_path / "pool", range(5)) / "shard_000000" / "manifest.json"
    good = path.read_bytes()
    for place in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"shard_000000/manifest\.json"):
            Pool(tmp_path / "pool")
    path.write_bytes(good)
    assert len(Pool(tmp_path / "pool")) == 5


def test_a_copy_of_a_shard_beside_it_is_not_part_of_the_pool(tmp_path: Path) -> None:
    pool = build(tmp_path / "pool", range(5))
    for name in ("shard_000000.bak", "shard_000001x", "shard_7"):
        shutil.copytree(pool / "shard_000000", pool / name)
    assert len(Pool(pool)) == 5
    assert len(Pool(build(pool, range(5, 7)))) == 7


def test_a_pool_may_have_more_shards_than_a_process_files(tmp_path: Path) -> None:
    build(tmp_path / "pool", range(40), shard_rows=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, before[1]))
    try:
        assert len(list(Pool(tmp_path / "pool"))) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_shards_of_another_model_or_tokenizer_are_refused(tmp_path: Path, what: str) -> None:
    other = dataclasses.replace(ORIGIN, **{f"{what}_digest": "c" * 40})
    build(tmp_path / "pool", range(5))
    build(tmp_path / "other", range(5), origin=other)
    mine = getattr(ORIGIN, f"{what}_digest")
    with pytest.raises(UserError, match=rf"pool/shard_000000: .*another {what} \({mine}\) .*\(c{{16}}\.\.\.\)"):
        PoolWriter(tmp_path / "pool", other)
    with pytest.raises(UserError, match=rf"other/shard_000000: .*another {what} \(c{{16}}\.\.\.\)"):
        merge([tmp_path / "pool", tmp_path / "other"], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    (tmp_path / "other" / "shard_000000").rename(tmp_path / "pool" / "shard_000001")
    with pytest.raises(UserError, match=rf"shard_000001: .*another {what}"):
        Pool(tmp_path / "pool")


def test_model_and_tokenizer_are_asked_for_one_by_one(tmp_path: Path) -> None:
    build(tmp_path / "pool", range(5))
    assert len(Pool(tmp_path / "pool", tokenizer_digest="bbbb")) == 5
    assert len(Pool(tmp_path / "pool", model_digest="aaaa", tokenizer_digest="bbbb")) == 5
    with pytest.raises(UserError, match="another model"):
        Pool(tmp_path / "pool", model_digest="bbbb")
    with pytest.raises(UserError, match="another tokenizer"):
        Pool(tmp_path / "pool", model_digest="aaaa", tokenizer_digest="aaaa")


def test_shards_after_the_last_note_are_dropped(tmp_path: Path) -> None:
    assert num_shards(tmp_path / "pool") == 0
    drop_shards_after(tmp_path / "pool", 0)
    build(tmp_path / "pool", range(45))
    noted = num_shards(tmp_path / "pool")
    assert noted == 3
    build(tmp_path / "pool", range(100, 130))
    killed = PoolWriter(tmp_path / "pool", ORIGIN)
    killed.add(trajectory(7))
    drop_shards_after(tmp_path / "pool", noted)
    assert sorted(path.name for path in (tmp_path / "pool").iterdir()) == [f"shard_{n:06d}" for n in range(3)]
    build(tmp_path / "pool", range(45, 50))
    assert all(same(row, trajectory(number)) for number, row in enumerate(Pool(tmp_path / "pool")))


def test_the_next_shard_does_not_take_the_number_of_one_that_is_noted(tmp_path: Path) -> None:
    build(tmp_path / "pool", range(3), shard_rows=1)
    (tmp_path / "pool" / "shard_000001").rename(tmp_path / "elsewhere")
    assert num_shards(tmp_path / "pool") == 3
    build(tmp_path / "pool", range(3, 4))
    drop_shards_after(tmp_path / "pool", 3)
    assert [same(row, trajectory(number)) for number, row in zip((0, 2), Pool(tmp_path / "pool"))] == [True, True]


def test_a_filter_counts_what_it_drops_by_its_first_reason(tmp_path: Path) -> None:
    build(tmp_path / "pool", range(60))
    all_of_it = [trajectory(number) for number in range(60)]
    problems = {row.problem_id for row in all_of_it[:50]}
    done = []
    found = filter_pool(
        tmp_path / "pool",
        tmp_path / "good",
        problems=problems,
        min_reward=0.4,
        max_response_tokens=20,
        keep=lambda row: len(row.prompt_ids) > 2,
        advance=done.append,
    )
    good = [row for row in all_of_it[:50] if row.reward >= 0.4]
    short = [row for row in good if len(row.response_ids) <= 20]
    left = [row for row in short if len(row.prompt_ids) > 2]
    assert all(same(one, other) for one, other in zip(Pool(tmp_path / "good"), left, strict=True))
    assert found.kept == len(left) and 0 < len(left) < len(short) < len(good) < 50
    reasons = {"problem": 10, "reward": 50 - len(good), "response_tokens": len(good) - len(short)}
    assert found.dropped == reasons | {"keep": len(short) - len(left)} and sum(done) == 60


def test_a_reward_is_not_below_itself(tmp_path: Path) -> None:
    with PoolWriter(tmp_path / "pool", ORIGIN) as writer:
        writer.add(dataclasses.replace(trajectory(1), reward=0.7))  # in float32 it is a little less
    assert filter_pool(tmp_path / "pool", tmp_path / "good", min_reward=0.7).kept == 1


def test_an_empty_result_is_an_error_and_no_pool(tmp_path: Path) -> None:
    build(tmp_path / "pool", range(5))
    for condition in ({"min_reward": 2.0}, {"keep": lambda row: False}, {"problems": []}):
        with pytest.raises(UserError, match=r"good: would be empty: no trajectory of .*/pool"):
            filter_pool(tmp_path / "pool", tmp_path / "good", **condition)
        assert not (tmp_path / "good").exists()
    with pytest.raises(UserError, match="would be empty"):
        merge([], tmp_path / "good")


def test_a_damaged_source_leaves_no_half_target(tmp_path: Path) -> None:
    build(tmp_path / "one", range(20))  # its shard is finished before the other's damage is met
    hot = dataclasses.replace(ORIGIN, sampling={"temperature": 2.0})
    path = build(tmp_path / "two", range(45), origin=hot) / "shard_000002" / "data.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="row 44 of the pool"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_pool_is_never_added_to_by_a_filter_or_a_merge(tmp_path: Path) -> None:
    build(tmp_path / "pool", range(5))
    build(tmp_path / "target", range(5))
    for act in (lambda: filter_pool(tmp_path / "pool", tmp_path / "target"), lambda: merge(["pool"], "target")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="holds a pool already"):
            patch.chdir(tmp_path)
            act()
    assert len(Pool(tmp_path / "target")) == 5


def test_shards_of_one_provenance_are_joined_and_others_kept_apart(tmp_path: Path) -> None:
    hot = dataclasses.replace(ORIGIN, sampling={"temperature": 2.0})
    build(tmp_path / "one", range(7), shard_rows=2)
    build(tmp_path / "one", range(7, 12), origin=hot)
    assert merge([tmp_path / "one"], tmp_path / "both") == 12
    pool = Pool(tmp_path / "both")
    assert pool.num_shards == 2 and pool.provenances() == [ORIGIN, hot]
    assert all(same(row, trajectory(number)) for number, row in enumerate(pool))


def test_pools_are_merged_in_order(tmp_path: Path) -> None:
    build(tmp_path / "one", range(7))
    build(tmp_path / "two", range(7, 12))
    assert merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both") == 12
    assert all(same(row, trajectory(number)) for number, row in enumerate(Pool(tmp_path / "both")))


def test_no_pool_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished shard"):
        Pool(tmp_path / "nothing")
