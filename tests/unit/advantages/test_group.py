import pytest
import torch

from megatron_rl.advantages.group import group_advantages
from megatron_rl.advantages.shaping import overlong_penalty
from megatron_rl.config.methods.shared import OverlongConfig


def rewards(*counts: int) -> torch.Tensor:
    """So many ones, then so many zeros."""
    return torch.cat([torch.ones(counts[0]), torch.zeros(counts[1])])


@pytest.mark.parametrize(
    ("right", "wrong", "high", "low"),
    [(4, 12, 1.67705, -0.55902), (6, 12, 1.37437, -0.68718), (2, 16, 2.74874, -0.34359)],
)
def test_unbiased_standard_deviation(right: int, wrong: int, high: float, low: float) -> None:
    advantages = group_advantages(rewards(right, wrong), normalize=True, leave_one_out=False)
    torch.testing.assert_close(
        advantages, torch.tensor([high] * right + [low] * wrong), atol=2e-5, rtol=0
    )  # the 1e-6 beside the std shows


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_give_exact_zeros(value: float, normalize: bool) -> None:
    advantages = group_advantages(torch.full((7,), value), normalize=normalize, leave_one_out=False)
    assert torch.equal(advantages, torch.zeros(7))


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    r = torch.tensor([1.0, 0.0, 0.5, 2.0])
    expected = torch.stack([r[i] - torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(4)])
    torch.testing.assert_close(group_advantages(r, normalize=False, leave_one_out=True), expected)


def test_without_std_it_is_the_centred_reward() -> None:
    advantages = group_advantages(rewards(1, 3), normalize=False, leave_one_out=False)
    torch.testing.assert_close(advantages, torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        group_advantages(torch.ones(1), normalize=True, leave_one_out=False)


@pytest.mark.parametrize(("tokens", "penalty"), [(100, 0.0), (2560, 0.0), (2816, -0.5), (3072, -1.0)])
def test_overlong_penalty(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, max_tokens=3072, buffer=512, penalty=1.0) == penalty


def test_the_default_penalty_gives_dapos_advantages() -> None:
    """DAPO subtracts up to 1 from rewards of 1 and -1; what is learned from 1 and 0 under the default penalty is the same."""
    is_right, lengths = [1, 1, 0, 0, 1], [100, 2816, 2816, 3072, 3072]

    def advantages(right: float, wrong: float, penalty: float) -> torch.Tensor:
        shaped = [
            (right if one else wrong) + overlong_penalty(n, max_tokens=3072, buffer=512, penalty=penalty)
            for one, n in zip(is_right, lengths)
        ]
        return group_advantages(torch.tensor(shaped), normalize=True, leave_one_out=False)

    torch.testing.assert_close(advantages(1, 0, OverlongConfig().penalty), advantages(1, -1, 1.0), atol=1e-5, rtol=0)


def test_overlong_penalty_is_off_without_buffer() -> None:
    assert overlong_penalty(3072, max_tokens=3072, buffer=0, penalty=1.0) == 0.0
