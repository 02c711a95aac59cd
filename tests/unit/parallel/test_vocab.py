"""The fused path against plain float64 softmax: values and all gradients, one rank and several, padded columns."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel import vocab
from megatron_rl.parallel.vocab import TokenStatistics, vocab_parallel_statistics
from tests.forked import run_ranks

TOKENS, HIDDEN, VOCAB, PADDED = 23, 16, 37, 48
CUTS = [(4096, 1 << 20), (7, 20)]
"""(tokens of a chunk, elements of a block): one block, and many uneven ones."""


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)  # rows beyond VOCAB are not zero: they must not count
    weight[VOCAB] *= 100
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[::3] = (hidden @ weight[:VOCAB].t()).argmax(-1)[::3]
    return hidden, weight, labels, torch.randn(TOKENS, generator=generator), torch.randn(TOKENS, generator=generator)


def other() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and weight of a reference."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(PADDED, HIDDEN, generator=generator)


def set_cuts(chunk_tokens: int, block_elements: int) -> None:
    vocab.CHUNK_TOKENS, vocab.BLOCK_ELEMENTS = {"cpu": chunk_tokens}, {"cpu": block_elements}


def oracle(temperature: float) -> dict[str, torch.Tensor]:
    hidden, weight, labels, a, b = inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight[:VOCAB].t() / temperature
    log_p = logits.log_softmax(-1)
    log_probs, entropy = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (a.double() @ log_probs + b.double() @ entropy).backward()
    return {
        "log_probs": log_probs.detach(),
        "entropy": entropy.detach(),
        "log_sum_exp": logits.logsumexp(-1).detach(),
        "top_log_prob": log_p.max(-1).values.detach(),
        "is_top": log_p.argmax(-1) == labels,
        "hidden.grad": hidden.grad,
        "weight.grad": weight.grad,
    }


def statistics(hidden: torch.Tensor, shard: torch.Tensor, temperature: float = 1.0, **how: object) -> TokenStatistics:
    return vocab_parallel_statistics(
        hidden, shard, inputs()[2], vocab_size=VOCAB, temperature=temperature, tp_group=dist.group.WORLD, **how
    )


def gathered(shard: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard)
    return torch.cat(parts)


def my_shard(weight: torch.Tensor) -> torch.Tensor:
    return weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()


def on_rank(temperature: float, cuts: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Values, the gradient of hidden summed over ranks, and the gradient of the whole weight."""
    set_cuts(*cuts)
    hidden, weight, _, a, b = inputs()
    hidden.requires_grad_()
    shard = my_shard(weight)
    found = statistics(hidden, shard, temperature)
    (a @ found.log_probs + b @ found.entropy).backward()
    dist.all_reduce(hidden.grad)
    values = {name: getattr(found, name).detach() for name in TokenStatistics.__dataclass_fields__}
    return values | {"hidden.grad": hidden.grad, "weight.grad": gathered(shard.grad)}


@pytest.mark.parametrize("world_size", [1, 2, 4])  # with 4, the last rank holds nothing but padding
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("cuts", CUTS)
def test_equals_the_float64_oracle(world_size: int, temperature: float, cuts: tuple[int, int]) -> None:
    true = oracle(temperature)
    assert 0 < true["is_top"].sum() < TOKENS
    for results in run_ranks(on_rank, world_size, temperature, cuts):
        assert torch.equal(results.pop("is_top"), true["is_top"])
        for name, mine in results.items():
            torch.testing.assert_close(mine.double(), true[name], rtol=2e-5, atol=2e-5, msg=name)
        assert results["weight.grad"][VOCAB:].eq(0).all(), "padded rows have a gradient"


def one_gradient(name: str) -> list[torch.Tensor]:
    hidden, weight, _, a, _ = inputs()
    hidden.requires_grad_()
    (a @ getattr(statistics(hidden, weight.requires_grad_()), name)).backward()
    return [hidden.grad, weight.grad]


@pytest.mark.parametrize("name", ["log_probs", "entropy"])
def test_each_output_alone_has_its_gradient(name: str) -> None:
    hidden, weight, labels, a, _ = inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = (hidden @ weight[:VOCAB].t()).log_softmax(-1)
    values = log_p.gather(1, labels[:, None])[:, 0] if name == "log_probs" else -(log_p.exp() * log_p).sum(-1)
    (a.double() @ values).backward()
    for mine, true in zip(run_ranks(one_gradient, 1, name)[0], (hidden.grad, weight.grad)):
        torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=2e-5)


def into_main_grad(is_used_elsewhere: bool) -> tuple[torch.Tensor, bool, bool]:
    """Two backward passes into a buffer that holds something already."""
    hidden, weight, _, a, b = inputs()
    weight = torch.nn.Parameter(weight)
    weight.grad_added_to_main_grad = False
    main_grad = torch.ones(PADDED, HIDDEN)
    for _ in range(2):
        found = statistics(hidden, weight, main_grad=main_grad, is_weight_used_elsewhere=is_used_elsewhere)
        loss = a @ found.log_probs + b @ found.entropy
        # Tied embeddings: the same parameter is looked up as well.
        (loss + (weight[3].sum() if is_used_elsewhere else 0.0)).backward()
    other_use = weight.grad is not None and weight.grad[3].eq(2).all() and weight.grad.sum() == 2 * HIDDEN
    return main_grad - 1, bool(other_use), weight.grad_added_to_main_grad


@pytest.mark.parametrize("is_used_elsewhere", [False, True])
def test_the_weights_gradient_goes_straight_to_megatrons_buffer(is_used_elsewhere: bool) -> None:
    added, has_other_use, flag = run_ranks(into_main_grad, 1, is_used_elsewhere)[0]
    torch.testing.assert_close(added.double(), 2 * oracle(1.0)["weight.grad"], rtol=2e-5, atol=2e-5)
    assert flag != is_used_elsewhere, "with the flag up, Megatron would drop the embedding's gradient"
    assert has_other_use == is_used_elsewhere


def forward_twice() -> bool:
    hidden, weight, _, _, _ = inputs()
    with torch.no_grad():
        without = statistics(hidden, weight, 0.7)
    with_grad = statistics(hidden.requires_grad_(), weight, 0.7)
    return torch.equal(without.log_probs, with_grad.log_probs) and torch.equal(without.entropy, with_grad.entropy)


def test_gradient_mode_does_not_change_a_bit() -> None:
    assert run_ranks(forward_twice, 1) == [True]


def large_vocabulary() -> dict[str, torch.Tensor]:
    """Qwen's vocabulary and one word: cut in two, 151,937 words are 76,032 rows of a rank, 127 of the last not words."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(9, HIDDEN, generator=generator).requires_grad_()
    weight, labels = (
        torch.randn(152_064, HIDDEN, generator=generator),
        torch.randint(0, 151_937, (9,), generator=generator),
    )
    weight[151_937:] *= 10
    labels[0] = 151_936
    shard = my_shard(weight)
    found = vocab_parallel_statistics(
        hidden, shard, labels, vocab_size=151_937, temperature=1.0, tp_group=dist.group.WORLD
    )
    (found.log_probs.sum() + found.entropy.sum()).backward()
    dist.all_reduce(hidden.grad)
    log_p = (hidden.detach().double() @ weight[:151_937].double().t()).log_softmax(-1)
    torch.testing.assert_close(found.log_probs.double(), log_p.gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.is_top, log_p.argmax(-1) == labels)
    return {"hidden": hidden.grad, "weight": gathered(shard.grad)}


def test_a_vocabulary_that_does_not_divide() -> None:
    two, one = run_ranks(large_vocabulary, 2)[0], run_ranks(large_vocabulary, 1)[0]
    torch.testing.assert_close(two["hidden"], one["hidden"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["weight"], one["weight"], rtol=1e-4, atol=1e-6)
    assert two["weight"][151_937:].eq(0).all() and two["weight"][151_936].norm() > 0.1
