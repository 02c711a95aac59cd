import random

import pytest
import torch

from megatron_rl.data.pack import PackLayout, pack, plan_micro_batches, unpack
from megatron_rl.errors import UserError
from megatron_rl.types import RowKind, TrainingSample


def sample(prompt: list[int], response: list[int]) -> TrainingSample:
    row = TrainingSample(torch.tensor(prompt), torch.tensor(response), RowKind.RL)
    row.weights = torch.arange(1.0, len(response) + 1) + 10 * prompt[0]
    return row


def test_labels_are_shifted_inside_each_sequence() -> None:
    batch = pack([sample([1, 2, 3], [4, 5]), sample([6], [7, 8, 9])], [0, 1])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.labels.tolist() == [2, 3, 4, 5, 0, 7, 8, 9, 0]
    assert batch.response_mask.int().tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 5, 9] and batch.max_seqlen == 5
    assert batch.vectors["weights"].tolist() == [0, 0, 11, 12, 0, 61, 62, 63, 0]


def test_every_selected_label_is_a_response_token() -> None:
    samples = [sample([1, 2], [3]), sample([4], [5, 6])]
    batch = pack(samples, [1, 0])
    assert batch.labels[batch.response_mask].tolist() == [5, 6, 3]


def test_padding_is_a_sequence_that_no_mask_selects() -> None:
    batch = pack([sample([1, 2, 3], [4, 5])], [0], PackLayout(tp_size=4))
    assert len(batch.input_ids) == 8 and batch.cu_seqlens.tolist() == [0, 5, 8]
    assert not batch.response_mask[5:].any() and batch.vectors["weights"][5:].eq(0).all()


def test_unpack_is_the_inverse() -> None:
    samples = [sample([1, 2, 3], [4, 5]), sample([6], [7, 8, 9]), sample([2, 2], [1])]
    batch = pack(samples, [2, 0, 1], PackLayout(tp_size=4))
    unpack({"old_log_probs": batch.vectors["weights"]}, batch, samples)
    assert all(torch.equal(s.old_log_probs, s.weights) for s in samples)


def test_context_parallel_ranks_hold_a_pack_together() -> None:
    samples = [sample([1, 2, 3], [4, 5]), sample([6], [7, 8, 9, 10, 11, 12, 13, 14]), sample([2, 2], [1])]
    parts = [pack(samples, [2, 0, 1], PackLayout(tp_size=2, cp_size=2, cp_rank=rank)) for rank in range(2)]
    assert all(part.cu_seqlens.tolist() == [0, 8, 16, 32] and len(part.input_ids) == 16 for part in parts)
    filled = [[], []]
    for part, found in zip(parts, filled):
        unpack({"old_log_probs": part.vectors["weights"]}, part, samples)
        found += [row.old_log_probs for row in samples]
    assert all(torch.equal(a + b, row.weights) for a, b, row in zip(*filled, samples))
    # A label is the next token of the whole pack, also where that token is another rank's.
    whole = torch.zeros(32, dtype=torch.int64)
    for part in parts:
        whole[part.token_indices] = part.labels
    assert whole.tolist()[16:32] == [7, 8, 9, 10, 11, 12, 13, 14, *[0] * 8]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("max_tokens", [90, 200, 5000])
def test_plan_deals_every_row_once_and_evenly(num_ranks: int, max_tokens: int) -> None:
    lengths = [random.Random(seed).randint(1, 90) for seed in range(48)]
    plan = plan_micro_batches(lengths, num_ranks=num_ranks, max_tokens=max_tokens)
    rows = [row for rank in plan for batch in rank for row in batch]
    assert sorted(rows) == list(range(48))
    assert len({len(rank) for rank in plan}) == 1 and all(batch for rank in plan for batch in rank)
    for rank in plan:
        for batch in rank:
            assert sum(lengths[row] for row in batch) <= max_tokens
    loads = [sum(lengths[row] for batch in rank for row in batch) for rank in plan]
    assert max(loads) <= 4 / 3 * sum(lengths) / num_ranks + max(lengths)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"longest row has 500 tokens.*use 500 or more"):
        plan_micro_batches([500, 10, 10], num_ranks=1, max_tokens=100)
    assert plan_micro_batches([100, 100, 50], num_ranks=2, max_tokens=150) == [[[0, 2]], [[1]]]
    with pytest.raises(UserError, match=r"3 rows have to make at most 2 micro-batches.*multiple of 2"):
        plan_micro_batches([100, 100, 100], num_ranks=2, max_tokens=150)


def log_normal_lengths(count: int) -> list[int]:
    generator = random.Random(1)
    return [min(16384, max(16, int(generator.lognormvariate(7, 1)))) for _ in range(count)]


@pytest.mark.parametrize("num_ranks", [1, 8])
def test_micro_batches_are_full_and_ranks_have_equally_much_to_do(num_ranks: int) -> None:
    lengths = log_normal_lengths(4096)
    plan = plan_micro_batches(lengths, num_ranks=num_ranks, max_tokens=16384, quadratic_length=8192)
    assert sum(lengths) / sum(16384 for rank in plan for _ in rank) > 0.95
    costs = [sum(lengths[row] * (1 + lengths[row] / 8192) for batch in rank for row in batch) for rank in plan]
    assert max(costs) < 1.01 * min(costs)


def test_the_count_of_micro_batches_is_a_multiple() -> None:
    lengths = log_normal_lengths(100)
    plan = plan_micro_batches(lengths, num_ranks=2, max_tokens=9000, count_multiple=4)
    assert {len(rank) % 4 for rank in plan} == {0} and all(batch for rank in plan for batch in rank)
    with pytest.raises(UserError, match="use at least 8"):
        plan_micro_batches([5] * 7, num_ranks=2, max_tokens=9000, count_multiple=4)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [190, 400, 5000])
def test_rows_of_a_unit_stay_in_one_micro_batch(num_ranks: int, max_tokens: int) -> None:
    lengths = [random.Random(seed).randint(1, 90) for seed in range(48)]
    units = [row % 16 if row < 32 else None for row in range(48)]  # 16 pairs, far apart; 16 rows alone
    plan = plan_micro_batches(lengths, num_ranks=num_ranks, max_tokens=max_tokens, units=units)
    batches = [batch for rank in plan for batch in rank]
    assert sorted(row for batch in batches for row in batch) == list(range(48))
    assert len({len(rank) for rank in plan}) == 1 and all(batches)
    assert all(row + 16 in batch for batch in batches for row in batch if row < 16)
    assert all(sum(lengths[row] for row in batch) <= max_tokens for batch in batches)
    loads = [sum(lengths[row] for batch in rank for row in batch) for rank in plan]
    assert max(loads) <= 4 / 3 * sum(lengths) / num_ranks + 180
    assert plan == plan_micro_batches(lengths, num_ranks=num_ranks, max_tokens=max_tokens, units=units)


def test_units_of_one_row_change_nothing() -> None:
    lengths = [random.Random(seed).randint(1, 90) for seed in range(48)]
    for options in ({"num_ranks": 2, "max_tokens": 150}, {"num_ranks": 3, "max_tokens": 400, "quadratic_length": 64}):
        alone = plan_micro_batches(lengths, **options)
        assert alone == plan_micro_batches(lengths, **options, units=[None] * 48)
        assert alone == plan_micro_batches(lengths, **options, units=range(100, 148))


def test_units_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"longest unit of rows.*has 2 rows and 120 tokens.*use 120 or more"):
        plan_micro_batches([60, 60, 10], num_ranks=1, max_tokens=100, units=[7, 7, None])
    with pytest.raises(UserError, match=r"use at least 2 units of rows"):
        plan_micro_batches([10, 10], num_ranks=2, max_tokens=100, units=[7, 7])


def test_a_methods_own_vectors_travel_with_the_tokens() -> None:
    samples = [sample([1, 2, 3], [4, 5]), sample([6], [7, 8, 9])]
    samples[0].extra["margins"] = torch.tensor([0.5, -0.5])
    assert pack(samples, [0, 1]).vectors["margins"].tolist() == [0, 0, 0.5, -0.5, 0, 0, 0, 0, 0]
    alone = pack(samples, [1]).vectors  # the names do not depend on who shares a pack
    assert set(alone) == {"weights", "margins"} and alone["margins"].tolist() == [0, 0, 0, 0]
    moved = pack(samples, [0]).to(torch.device("cpu")).vectors["margins"]
    assert moved.dtype == torch.float32 and moved.tolist() == [0, 0, 0.5, -0.5, 0]


def test_an_own_vector_with_the_name_of_a_field_is_refused() -> None:
    row = sample([1], [2])
    row.extra["advantages"] = torch.zeros(1)
    with pytest.raises(AssertionError, match="advantages"):
        pack([row], [0])
