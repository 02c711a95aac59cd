"""Megatron-Core sees the CPU where it names CUDA, nobody else does."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.optimizer import clip_grads
from megatron.core.transformer import utils as transformer_utils

from megatron_rl.patches.megatron_core.device import Event, Stream, torch_view
from tests.forked import run_ranks
from tests.tiny_gpt import forward_backward, init_parallel, make_config, make_model, make_optimizer, wrap


def test_only_megatron_sees_another_torch() -> None:
    assert vars(clip_grads)["torch"] is torch_view
    assert clip_grads.torch.cuda.current_device() == torch.device("cpu")
    for real in (lambda: torch.zeros(1, device="cuda"), torch.cuda.current_device):
        with pytest.raises((AssertionError, RuntimeError)):
            real()
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_view_is_torch_in_all_else() -> None:
    assert torch_view.Tensor is torch.Tensor
    assert torch_view.distributed is torch.distributed
    assert not torch_view.cuda.is_available()
    assert torch_view.zeros(2, dtype=torch.int64).tolist() == [0, 0]
    assert torch_view.empty(2, device="meta").is_meta
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = torch_view.no_such_name


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0), None, "cpu"])
def test_factories_create_on_cpu_and_never_pinned(device: object) -> None:
    tensor = torch_view.tensor([1.0], device=device, pin_memory=True)
    assert tensor.device.type == "cpu"
    assert not tensor.is_pinned()


def test_event_measures_milliseconds() -> None:
    start, end = Event(enable_timing=True), Stream().record_event()
    assert 0.0 <= start.elapsed_time(end) < 1000.0
    assert end.elapsed_time(start) <= 0.0


def test_causal_mask_has_a_device() -> None:
    assert transformer_utils.get_default_causal_mask(2).tolist() == [[False, True], [False, False]]


def test_rotary_positions_are_split_in_zig_zag_over_context_ranks() -> None:
    def positions_here() -> list[float]:
        parallel_state.initialize_model_parallel(context_parallel_size=2)
        positions = torch.arange(8.0).view(8, 1, 1, 1)
        return get_pos_emb_on_this_cp_rank(positions, 0, parallel_state.get_context_parallel_group()).flatten().tolist()

    assert run_ranks(positions_here, 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]


def one_update(dtype: torch.dtype, use_distributed_optimizer: bool) -> tuple[float, float, bool]:
    bf16 = dtype == torch.bfloat16
    config = make_config(bf16=bf16, params_dtype=dtype, num_layers=1)
    init_parallel(config)
    model = wrap(make_model(config).to(dtype), use_distributed_optimizer=use_distributed_optimizer)
    optimizer = make_optimizer(model, log_num_zeros_in_grad=True)
    before = forward_backward(model)
    success, grad_norm, _num_zeros = optimizer.step()
    assert success and grad_norm > 1.0  # so that clipping, which checks the type by its name, has run
    return before, forward_backward(model), torch.zeros(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("use_distributed_optimizer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_lowers_the_loss(dtype: torch.dtype, use_distributed_optimizer: bool) -> None:
    [(before, after, is_type_restored)] = run_ranks(one_update, 1, dtype, use_distributed_optimizer)
    assert after < before
    assert is_type_restored
