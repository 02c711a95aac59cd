"""The policy: log-probs and updates of a trained model, in two verbs: ``fill_log_probs`` and ``train_step``.

Samples are the same on every rank. Each data-parallel rank computes its share of the rows, and the results are shared
again, so everything between two calls is plain data, equal on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.data.pack import full_batches, unpack
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.model.flops import efficiency
from megatron_rl.model.forward import PolicyModel
from megatron_rl.model.guards import check_gradient_norm, check_log_probs, check_same_rows, check_trainable
from megatron_rl.model.loss_report import reduce_reports, report
from megatron_rl.model.trainable import Trainable
from megatron_rl.types import POLICY_GRADIENT_KINDS, MicroBatch, Prompt, RowKind, TrainingSample

LossFunction = Callable[[Tensor, Tensor, MicroBatch], TokenTerms]
"""(log_probs [T], entropy [T], micro_batch) -> terms."""


class Policy:
    """A model whose outputs are log-probs and entropies, and how rows flow through it."""

    def __init__(self, trainable: Trainable) -> None:
        """Take the model; built by ``build_chunks``, so its last stage returns ``(log_probs, entropy)``.

        Raises:
            UserError: its optimizer's gradient norm would be wrong; on all ranks.
        """
        self.trainable, self.groups, self.timer = trainable, trainable.groups, trainable.timer
        if trainable.has_optimizer:
            check_gradient_norm(trainable.chunks, trainable.shape, trainable.groups)

    @property
    def chunks(self) -> list[PolicyModel]:
        """This rank's part of the model."""
        return self.trainable.chunks

    @property
    def shape(self) -> ModelShape:
        """Shape of the model."""
        return self.trainable.shape

    def efficiency(
        self, samples: Sequence[TrainingSample], *, num_passes: int, times: Mapping[str, float]
    ) -> dict[str, float]:
        """Return what a step's updates made of the devices, as ``flops.efficiency`` does.

        Args:
            samples: the rows trained on.
            num_passes: passes over them.
            times: ``time/<phase>_s`` of the step.
        """
        return efficiency(
            self.shape,
            ((sample.num_tokens, sample.num_response_tokens) for sample in samples),
            num_passes=num_passes,
            seconds=times.get("time/forward_backward_s", 0.0) + times.get("time/optimizer_s", 0.0),
            num_devices=self.groups.world_size,
            name=torch.cuda.get_device_name() if self.groups.device.type == "cuda" else "",
        )

    def log_probs_of(
        self, prompts: Sequence[Prompt], responses: Sequence[Tensor], *, batch_size: int, row_unit: int
    ) -> list[Tensor]:
        """Return the log-probs of each response, [R] float32. A collective.

        Args:
            prompts: P prompts, the same on every rank.
            responses: a response to each, [R] token ids.
            batch_size: rows of a mini-batch.
            row_unit: number of which a mini-batch has a multiple.
        """
        rows = [TrainingSample(prompt.prompt_ids, ids, RowKind.RL) for prompt, ids in zip(prompts, responses)]
        self.fill_log_probs(rows, full_batches(range(len(rows)), size=batch_size, multiple=row_unit), "old_log_probs")
        return [row.old_log_probs for row in rows if row.old_log_probs is not None]

    def fill_log_probs(
        self, samples: Sequence[TrainingSample], mini_batches: Sequence[Sequence[int]], *names: str
    ) -> None:
        """Set the named vectors, [R] float32, of every sample that lacks them, by forward passes.

        Args:
            samples: all rows of the step, on every rank.
            mini_batches: the row indices of each coming update. Rows run here in exactly the packs in which they will be
                trained on, so that before the first update both passes give the same bits.
            names: fields to fill: ``old_log_probs`` or ``ref_log_probs``, and ``entropy``, which costs nothing more.

        Raises:
            UserError: ranks have different rows, or a value is not finite; on all ranks.
        """
        check_same_rows(samples, update=self.trainable.num_updates + 1, cpu_group=self.groups.cpu_group)
        fields = {name: "entropy" if name == "entropy" else "log_probs" for name in names}
        for rows in mini_batches:
            chosen = [samples[row] for row in rows]
            micro_batches = self.trainable.micro_batches(chosen)
            with self.timer("log_probs"):
                outputs = self.trainable.forward(micro_batches, _return_log_probs)
                self._keep(outputs, fields, micro_batches, chosen)

    def train_step(self, samples: Sequence[TrainingSample], loss_function: LossFunction) -> dict[str, float]:
        """Run one optimizer update on one mini-batch; every sample carries its ``weights``.

        RL and replay rows that have no ``old_log_probs`` yet (all of them or none) get those of this very pass, before the
        update: a pass of ``fill_log_probs`` over the same packs would give the same bits.

        Returns:
            Metrics over the whole mini-batch, the same on every rank: ``loss``, ``grad_norm``, ``lr``, and what the loss
            reports.

        Raises:
            UserError: ranks have different rows, no token is trained on, or the loss or a gradient is not finite; on all
                ranks, before any weight has changed.
        """
        trainable, update = self.trainable, self.trainable.num_updates + 1
        check_same_rows(samples, update=update, cpu_group=self.groups.cpu_group)
        check_trainable(samples, update=update)
        # Megatron divides gradients by the integer number of loss tokens of the mini-batch; multiplying by it here leaves
        # exactly sum(weight * term).
        num_tokens = {
            kind: sum(s.num_loss_tokens for s in samples if s.kind is kind) for kind in {s.kind for s in samples}
        }
        num_global_tokens = sum(num_tokens.values())
        micro_batches = trainable.micro_batches(samples)
        is_own_past = any(sample.kind in POLICY_GRADIENT_KINDS and sample.old_log_probs is None for sample in samples)

        def weighted_loss(
            log_probs: Tensor, entropy: Tensor, batch: MicroBatch
        ) -> tuple[Tensor, Tensor, dict[str, Any]]:
            if is_own_past:
                batch.vectors["old_log_probs"] = log_probs.detach()
            terms = loss_function(log_probs, entropy, batch)
            loss = (terms.loss * batch.vectors["weights"]).sum()
            output = report(terms, batch, num_tokens, loss) | {"log_probs": log_probs.detach()}
            return loss * num_global_tokens, batch.loss_mask.sum().int(), output

        trainable.prepare_update()
        with self.timer("forward_backward"):
            # Megatron will divide auxiliary losses of experts by the same count.
            row_weight = num_global_tokens / len(samples)
            outputs = trainable.forward_backward(micro_batches, weighted_loss, row_weight=row_weight)
            if is_own_past:
                self._keep(outputs, {"old_log_probs": "log_probs"}, micro_batches, samples)
        metrics = reduce_reports(outputs, self.groups)
        return metrics | trainable.update(metrics["loss"])

    def _keep(
        self,
        outputs: Sequence[dict],
        fields: Mapping[str, str],
        micro_batches: Sequence[MicroBatch],
        samples: Sequence[TrainingSample],
    ) -> None:
        """Write vectors of the outputs (field of a sample -> key of an output) into the samples, on every rank.

        A given row was computed by the last stage of one data-parallel rank alone. A row keeps what it has already.
        """
        kept = {field: [getattr(sample, field) for sample in samples] for field in fields}
        for batch, output in zip(micro_batches, outputs):
            unpack({field: output[key].cpu() for field, key in fields.items()}, batch, samples)
        mine = {row for batch in micro_batches for row in batch.rows} if outputs else set()
        is_owner = self.groups.is_last_stage and self.groups.tp_rank == 0
        sizes = [sample.num_response_tokens for sample in samples]
        for field in fields:
            flat = torch.cat(
                [
                    getattr(sample, field) if is_owner and row in mine else torch.zeros(size)
                    for row, (sample, size) in enumerate(zip(samples, sizes))
                ]
            )
            dist.all_reduce(flat, group=self.groups.cpu_group)
            for sample, values, before in zip(samples, flat.split(sizes), kept[field]):
                setattr(sample, field, values.clone() if before is None else before)
            check_log_probs(samples, field)


def _return_log_probs(log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict]:
    """Report the vectors themselves: the loss function of a forward-only pass."""
    return log_probs.sum(), batch.loss_mask.sum().int(), {"log_probs": log_probs, "entropy": entropy}
