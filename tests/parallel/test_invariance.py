"""Any layout, one result: every gradient, against a float64 model that knows nothing of layouts; and proof that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rl.doctor.exactness import load_reference, naive_log_probs
from megatron_rl.losses.selection import top_k_mask
from tests.forked import run_ranks
from tests.parallel.invariance import (
    assert_exact,
    entropies,
    mutate_packs,
    num_ranks,
    outcomes,
    outside,
    recorded_batch,
    reference,
)
from tests.tiny_models import make_tiny_model

LAYOUTS = [
    {"tp": 1}, {"tp": 2}, {"tp": 2, "sp": True}, {"tp": 4}, {"tp": 4, "sp": True},
    {"pp": 2}, {"pp": 4}, {"pp": 2, "vpp": 2}, {"cp": 2}, {"cp": 4}, {"dp": 2},
    {"tp": 2, "cp": 2}, {"tp": 2, "cp": 2, "sp": True}, {"tp": 2, "pp": 2, "sp": True}, {"cp": 2, "dp": 2},
    {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}, {"pp": 2, "vpp": 2, "cp": 2}, {"tp": 2, "pp": 2, "vpp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "cp": 2, "sp": True},
]  # fmt: skip
MODELS = [("qwen3", True), ("llama", False)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        (family, tied): make_tiny_model(root / family, family, tied=tied, seed=5, num_hidden_layers=4)
        for family, tied in MODELS
    }


@pytest.fixture(scope="session")
def recorded(models: dict) -> dict:
    """(batch, reference) of each model."""
    batches = {case: recorded_batch(path) for case, path in models.items()}
    return {case: (batch, reference(models[case], batch)) for case, batch in batches.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_every_gradient_under_every_layout(models: dict, recorded: dict, layout: dict, case: tuple) -> None:
    batch, true = recorded[case]
    assert_exact(outcomes(models[case], batch, layout), true)


@pytest.mark.parametrize("tokens", [0, 150, 200])
@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 2, "pp": 2, "cp": 2, "sp": True}, {"pp": 2, "vpp": 2}], ids=str)
def test_every_gradient_under_every_packing(models: dict, recorded: dict, layout: dict, tokens: int) -> None:
    """0: not packed."""
    batch, true = recorded[MODELS[0]]
    assert_exact(outcomes(models[MODELS[0]], batch, layout, tokens=tokens), true)


@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 2, "sp": True}, {"cp": 2, "dp": 2}, {"pp": 2, "vpp": 2}], ids=str)
def test_overlapped_gradient_reduction(models: dict, recorded: dict, layout: dict) -> None:
    """The output weight's gradient goes straight to Megatron's buffer: the hook must fire all the same."""
    for case in MODELS:
        batch, true = recorded[case]
        overlapped = ("policy.ddp_cfg.overlap_grad_reduce=true",)
        assert_exact(outcomes(models[case], batch, layout, overlapped, tokens=150), true)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_selected_tokens_are_the_same(models: dict, recorded: dict, layout: dict) -> None:
    """The top 20 % by entropy of the whole batch; and a rollout's first update has ratio 1 exactly."""
    batch, _ = recorded[MODELS[0]]
    network = load_reference(models[MODELS[0]])
    true = torch.cat([naive_log_probs(network, row)[1] for row in batch]).detach()
    count = len(true) // 5
    wanted = top_k_mask(true.float(), count)
    threshold = float(true[wanted].min())
    for result in run_ranks(entropies, num_ranks(layout), models[MODELS[0]], batch, layout):
        found = top_k_mask(torch.cat(result), count)
        assert found.sum() == count
        assert ((true - threshold).abs()[found != wanted] < 1e-5).all()


# ------------------------------------------------------------------------------------------------ it can fail


def divide_by_local_count() -> None:
    from megatron_rl.model.trainable import Trainable

    run = Trainable._run

    def wrong(self, micro_batches, loss_function, **options):  # type: ignore[no-untyped-def]
        total = sum(LENGTHS_OF_RESPONSES)
        mine = sum(int(batch.loss_mask.sum()) for batch in micro_batches)

        def local(*args):  # type: ignore[no-untyped-def]
            loss, count, report = loss_function(*args)
            return loss * total / mine / self.groups.dp_size, count, report

        return run(self, micro_batches, local, **options)

    Trainable._run = wrong


def forget_the_other_ranks_queries() -> None:
    from megatron_rl.model import attention

    gather = attention.gather_from_sequence_parallel_region
    attention.gather_from_sequence_parallel_region = lambda x, group: gather(x, False, group)


def select_per_micro_batch() -> None:
    """What a selection inside the loss would do: the best fifth of each micro-batch's own tokens."""

    def select(batch, _samples, _rows):  # type: ignore[no-untyped-def]
        values = batch.vectors["old_log_probs"][batch.loss_mask]
        batch.vectors["weights"][batch.loss_mask] *= top_k_mask(values, len(values) // 5)

    mutate_packs(select)


def _zero_all_but_top(samples: list) -> None:
    """Weights of the fifth of the tokens with the largest old log-probs stay."""
    values = torch.cat([row.old_log_probs for row in samples])
    mask = top_k_mask(values, len(values) // 5)
    for row, chosen in zip(samples, mask.split([row.num_response_tokens for row in samples])):
        row.weights = row.weights * chosen


def shift_labels_twice_at_a_border() -> None:
    def shift(batch, _samples, _rows):  # type: ignore[no-untyped-def]
        last = batch.cu_seqlens[1:].long() - 2
        batch.labels[last] = batch.labels[(last + 2).clamp(max=len(batch.labels) - 1)]

    mutate_packs(shift)


def keep_the_target_logit_local() -> None:
    from megatron_rl.parallel.vocab import _Block

    add = _Block.sum

    def wrong(self, *values):  # type: ignore[no-untyped-def]
        return (values[0].clone(), *add(self, *values)[1:])

    _Block.sum = wrong


LENGTHS_OF_RESPONSES = [1, 120, 2, 9, 64, 17, 33, 5]
MUTATIONS = [
    (divide_by_local_count, {"dp": 2}),
    (forget_the_other_ranks_queries, {"cp": 2}),
    (shift_labels_twice_at_a_border, {"tp": 1}),
    (keep_the_target_logit_local, {"tp": 2}),
]


@pytest.mark.parametrize(("mutate", "layout"), MUTATIONS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_deliberate_error_is_noticed(models: dict, recorded: dict, mutate, layout: dict) -> None:  # type: ignore[no-untyped-def]
    batch, true = recorded[MODELS[1]]
    assert outside(outcomes(models[MODELS[1]], batch, layout, mutate=mutate)[0], true)


def test_selection_per_micro_batch_is_noticed(models: dict, recorded: dict) -> None:
    """Selected over the whole batch, it is right under any layout and packing; over micro-batches, with a single one only."""
    import copy

    model, (batch, _) = models[MODELS[1]], recorded[MODELS[1]]
    chosen = copy.deepcopy(batch)
    _zero_all_but_top(chosen)
    true = reference(model, chosen)
    several = [({"tp": 1}, 150), ({"dp": 2}, 10_000)]
    for layout, tokens in (({"tp": 1}, 10_000), *several):
        assert_exact(outcomes(model, chosen, layout, tokens=tokens), true)
    assert_exact(outcomes(model, batch, {"tp": 1}, tokens=10_000, mutate=select_per_micro_batch), true)
    for layout, tokens in several:
        assert outside(outcomes(model, batch, layout, tokens=tokens, mutate=select_per_micro_batch)[0], true)
