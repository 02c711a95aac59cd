"""Packed attention against each sequence on its own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.model import attention
from megatron_rl.model.attention import PackedCausalAttention

HEADS, GROUPS, SIZE = 6, 2, 8


def packed(lengths: list[int]) -> tuple[PackedCausalAttention, list[torch.Tensor], PackedSeqParams]:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=SIZE,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(sum(lengths), heads, SIZE, generator=generator).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    return PackedCausalAttention(config, 1, AttnMaskType.causal, "self"), tensors, params


def one_by_one(tensors: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    outputs = []
    for q, k, v in zip(*(t.split(lengths) for t in tensors)):
        q, k, v = (x.transpose(0, 1).double() for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // GROUPS, 0) for x in (k, v))
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).reshape(q.shape[1], -1))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", [[5, 1, 9, 3], [4, 4, 4], [7], [1, 1], [70, 3, 52, 64, 1, 38, 45, 33]])
@pytest.mark.parametrize("max_matmul", [512, 0])
def test_equals_each_sequence_alone(lengths: list[int], max_matmul: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MATMUL_MAX_LENGTH", max_matmul)
    module, tensors, params = packed(lengths)
    output = module(*tensors, None, packed_seq_params=params)
    expected = one_by_one(tensors, lengths)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad(output, tensors, upstream)
    true = torch.autograd.grad(expected, tensors, upstream.double())
    for got, want in zip(mine, true):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_sequences_of_like_length_share_a_batch() -> None:
    assert attention._batches([70, 3, 53, 64, 1, 38, 45, 33]) == [[0, 2, 3], [5, 6], [7], [1, 4]]
    assert attention._batches([40, 40]) == [[0, 1]]


def test_dropout_is_refused() -> None:
    module, _, _ = packed([3])
    with pytest.raises(ValueError, match="attention_dropout"):
        PackedCausalAttention(module.config, 1, AttnMaskType.causal, "self", attention_dropout=0.1)
