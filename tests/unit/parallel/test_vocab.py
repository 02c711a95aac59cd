"""The fused path against plain float64 log-softmax: values and both gradients, one rank and two, padded columns."""

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel import vocab
from megatron_rl.parallel.vocab import vocab_parallel_log_probs
from tests.forked import run_ranks

TOKENS, HIDDEN, VOCAB, PADDED = 23, 16, 37, 48


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)  # rows beyond VOCAB are not zero: they must not count
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden, weight, labels, torch.randn(TOKENS, generator=generator), torch.randn(TOKENS, generator=generator)


def oracle(temperature: float) -> list[torch.Tensor]:
    hidden, weight, labels, a, b = inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = (hidden @ weight[:VOCAB].t() / temperature).log_softmax(-1)
    log_probs, entropy = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (a.double() @ log_probs + b.double() @ entropy).backward()
    return [log_probs.detach(), entropy.detach(), hidden.grad, weight.grad]


def on_rank(temperature: float, chunk_elements: int) -> list[torch.Tensor]:
    """Values, the gradient of hidden summed over ranks, and the gradient of the whole weight."""
    vocab.CHUNK_ELEMENTS = chunk_elements
    hidden, weight, labels, a, b = inputs()
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden.requires_grad_()
    shard = weight.chunk(size)[rank].clone().requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(
        hidden, shard, labels, vocab_size=VOCAB, temperature=temperature, tp_group=dist.group.WORLD
    )
    (a @ log_probs + b @ entropy).backward()
    dist.all_reduce(hidden.grad)
    grads = [torch.empty_like(shard) for _ in range(size)]
    dist.all_gather(grads, shard.grad)
    return [log_probs.detach(), entropy.detach(), hidden.grad, torch.cat(grads)]


@pytest.mark.parametrize("world_size", [1, 2, 4])  # with 4, the last rank holds nothing but padding
@pytest.mark.parametrize(("temperature", "chunk_elements"), [(1.0, 1 << 20), (0.6, 100)])
def test_equals_the_float64_oracle(world_size: int, temperature: float, chunk_elements: int) -> None:
    for results in run_ranks(on_rank, world_size, temperature, chunk_elements):
        for mine, true in zip(results, oracle(temperature)):
            torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=2e-5)
        assert results[3][VOCAB:].eq(0).all(), "padded rows have a gradient"


def forward_twice() -> bool:
    hidden, weight, labels, _, _ = inputs()
    settings = {"vocab_size": VOCAB, "temperature": 0.7, "tp_group": dist.group.WORLD}
    with torch.no_grad():
        without = vocab_parallel_log_probs(hidden, weight, labels, **settings)
    with_grad = vocab_parallel_log_probs(hidden.requires_grad_(), weight, labels, **settings)
    return all(torch.equal(x, y.detach()) for x, y in zip(without, with_grad))


def test_gradient_mode_does_not_change_a_bit() -> None:
    assert run_ranks(forward_twice, 1) == [True]
