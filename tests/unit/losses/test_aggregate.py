import pytest

from megatron_rl.losses.aggregate import token_weights

LENGTHS = [2, 6, 0]


def test_token_mean_divides_by_all_tokens() -> None:
    assert token_weights(LENGTHS, "token-mean", max_tokens=10) == [1 / 8, 1 / 8, 0]


def test_seq_mean_token_mean_gives_each_row_the_same() -> None:
    weights = token_weights(LENGTHS, "seq-mean-token-mean", max_tokens=10)
    assert [w * n for w, n in zip(weights, LENGTHS)] == pytest.approx([0.5, 0.5, 0])


def test_seq_mean_token_sum_norm_divides_by_a_constant() -> None:
    assert token_weights(LENGTHS, "seq-mean-token-sum-norm", max_tokens=10) == [1 / 20, 1 / 20, 0]


def test_nothing_to_train_on_has_no_weight() -> None:
    assert token_weights([0, 0], "token-mean", max_tokens=10) == [0, 0]
