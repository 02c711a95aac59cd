from itertools import combinations

import pytest

from megatron_rl.errors import UserError
from megatron_rl.evaluation.pass_at_k import pass_at_k


def test_value_of_the_papers_formula():
    assert pass_at_k(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)  # 1 - C(7, 5) / C(10, 5) = 1 - 21 / 252


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_equals_the_share_of_subsets_with_a_correct_sample(num_correct, k):
    samples = [i < num_correct for i in range(6)]
    subsets = [any(subset) for subset in combinations(samples, k)]
    assert pass_at_k(6, num_correct, k) == pytest.approx(sum(subsets) / len(subsets), rel=1e-12, abs=1e-15)


def test_pass_at_1_is_the_mean():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)


def test_large_counts_stay_exact():
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k", "field"), [(4, 5, 1, "num_correct"), (4, -1, 1, "num_correct"), (0, 0, 1, "k"),
                                                    (4, 1, 5, "k"), (4, 1, 0, "k")])  # fmt: skip
def test_counts_out_of_range_are_errors(n, c, k, field):
    with pytest.raises(UserError) as caught:
        pass_at_k(n, c, k)
    assert caught.value.field == field
