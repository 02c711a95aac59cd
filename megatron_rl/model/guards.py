"""Checks before weights change. Each ends in the same error on every rank, or in none."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from importlib import metadata
from inspect import signature

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.table import find_entry
from megatron_rl.data.pack import VECTOR_FIELDS
from megatron_rl.errors import UserError
from megatron_rl.model.forward import PolicyModel
from megatron_rl.model.weights import named_parameters
from megatron_rl.parallel.agree import all_ranks_agree, gather_json
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import POLICY_GRADIENT_KINDS, TrainingSample

SLICE_ELEMENTS = 1 << 28
"""Elements of a gradient buffer that one kernel reads: torch's reductions count in 32 bits."""


def check_same_rows(samples: Sequence[TrainingSample], *, update: int, cpu_group: dist.ProcessGroup) -> None:
    """Check that the rows are the same on every rank, in all that an update depends on.

    Raises:
        UserError: naming the ranks that differ from rank 0.
    """
    digests = gather_json(_digest(samples), cpu_group)
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(
            f"rows of optimizer update {update}",
            len(samples),
            f"differ between rank 0 and rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}",
            "see that every node reads the same files and runs the same version; no weight was changed",
        )


def check_trainable(samples: Sequence[TrainingSample], *, update: int) -> None:
    """Check that a token is trained on, and that of each kind either all rows have a vector or none has.

    Raises:
        UserError: no row has a token that enters the loss.
    """
    for kind in {
        POLICY_GRADIENT_KINDS if sample.kind in POLICY_GRADIENT_KINDS else frozenset({sample.kind})
        for sample in samples
    }:
        for name in VECTOR_FIELDS:
            rows = [sample for sample in samples if sample.kind in kind]
            assert len({getattr(row, name) is None for row in rows}) == 1, f"{name} of some {set(kind)} rows alone"
    if not any(sample.num_loss_tokens for sample in samples):
        raise UserError(
            f"rows of optimizer update {update}",
            len(samples),
            "have no token to train on: every response is empty or masked",
            "look at the rollouts of this step, and at rollout.max_new_tokens; no weight was changed",
        )


def check_log_probs(samples: Sequence[TrainingSample], name: str) -> None:
    """Check that the filled vectors are finite. All ranks have the same data, so none has to ask another.

    Raises:
        UserError: naming the first row that is not.
    """
    for row, sample in enumerate(samples):
        if not bool(getattr(sample, name).isfinite().all()):
            raise UserError(
                name,
                f"row {row} of {len(samples)}",
                "is not finite: the model's hidden states overflow or hold NaN",
                "look for the first bad update in the metrics, or use trainer.precision=fp32 to find the cause",
            )


def check_gradient_norm(chunks: Sequence[PolicyModel], shape: ModelShape, groups: Groups) -> None:
    """Check that the optimizer will count every part of every weight once in the norm that a run reports and clips by.

    Megatron counts a weight that is marked as cut on every tensor-parallel rank, any other on one of them. Marks can be
    wrong: Megatron-Core before 0.19 leaves those of Transformer Engine's layers to that, which knows nothing of experts
    (Megatron-LM #5916), and marks whole projections of latent attention as cut.

    Raises:
        UserError: naming a weight that is not; on all ranks.
    """
    options = {"tp_group": groups.tp_group}
    if "expert_tp_group" in signature(param_is_not_tensor_parallel_duplicate).parameters:
        options["expert_tp_group"] = groups.etp_group
    with all_ranks_agree(groups.cpu_group):
        for name, tensor in named_parameters(chunks, shape, groups):
            if not isinstance(tensor, torch.nn.Parameter):
                continue
            entry = find_entry(name, shape)
            rank = groups.tp_rank if entry.expert is None else groups.etp_rank
            is_counted = param_is_not_tensor_parallel_duplicate(tensor, **options)
            if is_counted != (entry.kind.name != "replicated" or rank == 0):
                count = "more than once in" if is_counted else "not wholly in"
                raise UserError(
                    "policy.megatron_cfg.tensor_model_parallel_size", groups.tp_size,
                    f"would have {name} {count} the gradient norm with megatron-core {metadata.version('megatron-core')}: "
                    "clipping and grad_norm would be wrong",
                    "install megatron-core 0.19.2 or later, or set policy.megatron_cfg.transformer_impl=local, or do without "
                    "tensor parallelism",
                )  # fmt: skip


def check_finite(loss: float, gradients: Iterable[Tensor], *, update: int, cpu_group: dist.ProcessGroup) -> None:
    """Check that loss and gradients are finite.

    Args:
        loss: the same on every rank.
        gradients: this rank's.
        update: counted from 1.
        cpu_group: all ranks, over gloo.

    Raises:
        UserError: one of them is not.
    """
    finite = torch.tensor(float(all(map(_is_finite, gradients))))
    dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=cpu_group)
    if not math.isfinite(loss) or not finite.item():
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise UserError(
            f"{what} at optimizer update {update}",
            loss if what == "loss" else None,
            "is not finite; no weight was changed and the last checkpoint is intact",
            "lower policy.optim.lr, check the data of this step, or use trainer.precision=fp32 to find the cause",
        )


def _is_finite(values: Tensor) -> bool:
    """Return whether all values are finite, without a mask of their size.

    The least and the largest of each slice tell (NaN is both), and all of those are read at once.
    """
    slices = values.flatten().split(SLICE_ELEMENTS) if values.numel() else ()
    ends = [end for part in slices for end in part.aminmax()]
    return not ends or bool(torch.stack(ends).isfinite().all())


def _digest(samples: Sequence[TrainingSample]) -> list[int]:
    digest = 0
    for sample in samples:
        vectors = [
            getattr(sample, name) for name in ("prompt_ids", "response_ids", "experts", "loss_mask", *VECTOR_FIELDS)
        ]
        vectors += sample.extra.values()
        outline = [
            int(sample.kind),
            sample.unit,
            *sample.extra,
            *(-1 if vector is None else vector.numel() for vector in vectors),
        ]
        digest = zlib.crc32(repr(outline).encode(), digest)
        for vector in vectors:
            if vector is not None:
                digest = zlib.crc32(memoryview(vector.contiguous().numpy()), digest)  # type: ignore[arg-type]
    return [len(samples), digest]
