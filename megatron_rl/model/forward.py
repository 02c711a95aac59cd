"""GPTModel that ends in per-token log-probs instead of logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_rl.model.experts import PackParams
from megatron_rl.parallel.vocab import vocab_parallel_statistics
from megatron_rl.types import MicroBatch

HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters
"""Megatron-Core, from 0.18 on, lets its caller say what becomes of the last hidden states; before, a method is replaced."""


class PolicyModel(GPTModel):
    """One pipeline stage. The last one returns ``(log_probs, entropy)``, each [T] float32; others their hidden states.

    Only positions in ``response_mask`` reach the output layer; the others are 0.0.
    """

    temperature: float = 1.0
    """Sampling temperature of the rollouts that are scored; log-probs are always at it."""
    true_vocab_size: int
    """Vocabulary without Megatron's padding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage; the arguments are those of ``GPTModel.forward``."""
        hook = {"output_processor": self.token_statistics} if HAS_OUTPUT_PROCESSOR else {}
        return super().forward(*args, **hook, **kwargs)

    if not HAS_OUTPUT_PROCESSOR:

        def _postprocess(  # type: ignore[no-untyped-def]
            self, hidden_states, input_ids=None, position_ids=None, labels=None, *_args, loss_mask=None, **_kwargs: Any
        ):
            if not self.post_process:
                return hidden_states
            return self.token_statistics(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask)

    def token_statistics(
        self, *, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return ``(log_probs, entropy)``, each [T] float32, from the last hidden states, [T, 1, H].

        Args:
            hidden_states: of this rank; its part of the tokens under sequence parallelism.
            labels: [1, T] int64.
            loss_mask: [1, T] bool, where they are wanted.
        """
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=tp_group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
        hidden = hidden[:, 0]  # [T, 1, H]: a pack is one row
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        mask = loss_mask[0]
        where = mask.nonzero()[:, 0]
        found = vocab_parallel_statistics(
            hidden[where],
            weight,
            labels[0, where],
            vocab_size=self.true_vocab_size,
            temperature=self.temperature,
            tp_group=tp_group,
            main_grad=getattr(weight, "main_grad", None),
            is_weight_used_elsewhere=self.share_embeddings_and_output_weights and self.pre_process,
        )
        nothing = torch.zeros(len(mask), device=hidden.device)
        return nothing.index_copy(0, where, found.log_probs), nothing.index_copy(0, where, found.entropy)


def run_model(model: torch.nn.Module, batch: MicroBatch, *, row_weight: float = 0.0) -> tuple[Tensor, Tensor] | Tensor:
    """Run one packed micro-batch forward through one (wrapped) pipeline stage.

    Args:
        model: the stage.
        batch: the pack.
        row_weight: of each row's auxiliary loss, in a model of experts that is asked for one.

    Returns:
        On the last stage the model's outputs, of a ``PolicyModel`` ``(log_probs, entropy)``, each [T] float32; elsewhere the
        hidden states for the next stage.
    """
    packed = PackParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        sequence=batch.sequence,
        lengths=batch.lengths,
        row_weight=row_weight,
        experts=batch.experts,
    )
    return model(
        batch.input_ids[None],
        batch.position_ids[None],
        None,
        labels=batch.labels[None],
        loss_mask=batch.response_mask[None],
        packed_seq_params=packed,
    )
