"""A trainable model: Megatron's chunks on this rank, their optimizer if they have one, and passes over packs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.config.policy import OptimConfig
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.data.pack import pack, pack_layout, plan_micro_batches
from megatron_rl.model.build import build_chunks
from megatron_rl.model.forward import run_model
from megatron_rl.model.guards import check_finite
from megatron_rl.model.offload import UpdateMemory
from megatron_rl.model.optimizer import (
    KEPT_IN_GROUPS,
    build_scheduler,
    changed_settings,
    check_optimizer,
    ddp_config,
    optimizer_config,
    set_schedule,
)
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import MicroBatch, TrainingSample

MicroBatchLoss = Callable[..., tuple[Tensor, Tensor, dict[str, Any]]]
"""(*outputs of the last stage, micro-batch) -> (sum of losses, number of loss tokens, what to report)."""


class Trainable:
    """One model of a run on this rank, with or without an optimizer.

    It knows nothing of what its outputs mean. ``Policy`` (model/policy.py) reads log-probs from one. A critic would be a
    second one: built with its own ``build`` (chunks whose last stage returns values), shape, weights and ``optim``; it
    would call ``forward`` to fill ``values``, and ``prepare_update``, ``forward_backward`` with a value loss and ``update``
    to learn. A frozen teacher is one without an optimizer.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        groups: Groups,
        *,
        optim: OptimConfig | None,
        fill_weights: Callable[[list[Any]], None],
        timer: Any,
        build: Callable[[Config, ModelShape, Groups], list[Any]] = build_chunks,
    ) -> None:
        """Build the model, and its optimizer if it has one.

        Args:
            config: layout, precision and packing of the run.
            shape: of the model.
            groups: process groups.
            optim: settings of the optimizer. None: the model is never updated, and has no gradient buffers, no float32 main
                weights and no optimizer state.
            fill_weights: puts the initial weights into the bare chunks; called before the optimizer copies them.
            timer: ``PhaseTimer``.
            build: makes the bare chunks of this rank.
        """
        if optim is not None:
            check_optimizer(optim, groups.device)
        self.config, self.shape, self.groups, self.timer = config, shape, groups, timer
        self.chunks = build(config, shape, groups)
        """This rank's part of the model: one, or several under virtual pipelining."""
        fill_weights(self.chunks)
        self.megatron_config = self.chunks[0].config
        self.num_updates = 0
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.models: list[Any] = [self._in_precision(chunk) for chunk in self.chunks]
        """The chunks as Megatron's schedule runs them."""
        if optim is None:
            for parameter in self.parameters():
                parameter.requires_grad_(False)
        else:
            self._build_optimizer(optim)
        self.update_memory = UpdateMemory(self.gradient_buffers(), self.optimizer, self.parameters())
        """Gradients and optimizer state, released while rollouts are sampled. Empty without an optimizer."""

    def _in_precision(self, chunk: Any) -> Any:
        return Float16Module(self.megatron_config, chunk) if self.config.trainer.precision == "bf16" else chunk

    def _build_optimizer(self, optim: OptimConfig) -> None:
        """Wrap the models with gradient buffers, and give them optimizer and schedule."""
        ddp = ddp_config(self.config.policy.ddp_cfg)
        # Gradients of later chunks come first, and those of the first chunk last: only there is one bucket at a time.
        self.models = [
            DistributedDataParallel(self.megatron_config, ddp, model, disable_bucketing=index > 0)
            for index, model in enumerate(self.models)
        ]
        self.optimizer = get_megatron_optimizer(optimizer_config(optim, self.megatron_config), self.models)
        self.scheduler = build_scheduler(self.optimizer, optim)
        set_schedule(self.scheduler, self.num_updates)
        self.megatron_config.finalize_model_grads_func = finalize_model_grads
        self.megatron_config.grad_scale_func = self.optimizer.scale_loss
        if self.models[0].ddp_config.overlap_grad_reduce:
            no_sync = [model.no_sync for model in self.models]
            self.megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @property
    def has_optimizer(self) -> bool:
        """True where the model can be updated."""
        return self.optimizer is not None

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield this rank's parameters."""
        for chunk in self.chunks:
            yield from chunk.parameters()

    def gradient_buffers(self) -> Iterator[Any]:
        """Yield Megatron's gradient buffers; none without an optimizer."""
        for model in self.models if self.has_optimizer else ():
            yield from model.buffers
            yield from model.expert_parallel_buffers

    # ------------------------------------------------------------------------------------------------ passes

    def micro_batches(self, samples: Sequence[TrainingSample]) -> list[MicroBatch]:
        """Pack this data-parallel rank's rows: a pure function of the rows, so that each pass over them has the same packs."""
        with self.timer("pack"):
            groups = self.groups
            layout = pack_layout(self.config.policy, cp_rank=groups.cp_rank, cp_group=groups.cp_group)
            plan = plan_micro_batches(
                [layout.padded(sample.num_tokens) for sample in samples],
                num_ranks=groups.dp_size,
                max_tokens=self.config.policy.train_micro_batch_tokens,
                # The interleaved schedule deals micro-batches out in groups of the pipeline's size.
                count_multiple=groups.pp_size if len(self.chunks) > 1 else 1,
                # Attention costs as much as the dense layers at about 12 x hidden_size tokens.
                quadratic_length=12 * self.shape.hidden_size,
                units=[sample.unit for sample in samples],
            )
            packs = [pack(samples, rows, layout) for rows in plan[groups.dp_rank]]
            return [batch.to(self.groups.device) for batch in packs]

    def forward(self, micro_batches: Sequence[MicroBatch], loss_function: MicroBatchLoss) -> list[dict[str, Any]]:
        """Run the packs forward without gradients; return the reports of ``loss_function`` (empty before the last stage)."""
        for model in self.models:
            model.eval()
        with torch.no_grad():
            return self._run(micro_batches, loss_function, forward_only=True)

    def prepare_update(self) -> None:
        """Bring back the memory of an update, as zero gradients, and set the model to training."""
        assert self.has_optimizer, "this model is never updated"
        with self.timer("offload"):
            self.update_memory.resume()
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss_function: MicroBatchLoss, *, row_weight: float
    ) -> list[dict[str, Any]]:
        """Add the gradients of all packs to the buffers; return the reports of ``loss_function`` (empty before the last stage).

        Args:
            micro_batches: of ``micro_batches``.
            loss_function: gives the sum of the losses, which is divided by the sum of the token counts it gives.
            row_weight: of each row's auxiliary loss, in a model of experts that has one.
        """
        return self._run(micro_batches, loss_function, forward_only=False, row_weight=row_weight)

    def update(self, loss: float) -> dict[str, float]:
        """Update the weights with the gradients; return ``grad_norm`` and the ``lr`` that was used.

        Args:
            loss: of the mini-batch, the same on every rank.

        Raises:
            UserError: the loss or a gradient is not finite; on all ranks, before any weight has changed.
        """
        gradients = (buffer.grad_data for buffer in self.gradient_buffers())
        check_finite(loss, gradients, update=self.num_updates + 1, cpu_group=self.groups.cpu_group)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        with self.timer("optimizer"):
            _, grad_norm, _ = self.optimizer.step()
            self.num_updates += 1
            set_schedule(self.scheduler, self.num_updates)
        return {"grad_norm": float(grad_norm or 0.0), "lr": learning_rate}

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_function: MicroBatchLoss,
        *,
        forward_only: bool,
        row_weight: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Run Megatron's schedule over the packs."""

        def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Any, Callable]:
            batch = next(batches)
            output = run_model(model, batch, row_weight=row_weight)
            return output, lambda out: loss_function(*out, batch)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.models] if len(self.models) > 1 else iter(micro_batches),
            model=self.models if len(self.models) > 1 else self.models[0],
            num_microbatches=len(micro_batches),
            seq_length=max(len(batch.input_ids) for batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    # ------------------------------------------------------------------------------------------------ weights and state

    def snapshot(self) -> list[Tensor]:
        """Return a copy of this rank's weights, on the CPU."""
        return [parameter.detach().to("cpu", copy=True) for parameter in self.parameters()]

    @contextmanager
    def weights_of(self, snapshot: Sequence[Tensor]) -> Iterator[None]:
        """Compute with other weights inside the block; the trained ones are back, bit for bit, after it."""
        with self.timer("reference_swap"):
            trained = self.snapshot()
        try:
            with self.timer("reference_swap"):
                self.copy_weights(snapshot)
            yield
        finally:
            with self.timer("reference_swap"):
                self.copy_weights(trained)

    def copy_weights(self, weights: Sequence[Tensor]) -> None:
        """Overwrite this rank's model weights in place (the optimizer's float32 copies are not touched)."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), weights, strict=True):
                parameter.copy_(value)

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Take over weights, optimizer state and count of updates of a checkpoint, under the settings of our own config.

        Megatron would go on with the checkpoint's settings: they are in its scheduler's state, and its parameter groups
        carry a copy of each. The schedule itself needs no state: it follows from the settings and the count of updates.
        Without an optimizer the weights and the count are taken over.

        Returns:
            The settings that differ from the checkpoint's, such as ``policy.optim.lr 0.001 -> 0.0005``.
        """
        assert not self.update_memory.is_released
        for chunk, weights in zip(self.chunks, state["model"], strict=True):
            chunk.load_state_dict(weights)
        self.num_updates = state["num_updates"]
        return self._load_optimizer(state) if self.has_optimizer else []

    def _load_optimizer(self, state: Mapping[str, Any]) -> list[str]:
        """Load the optimizer's state, keep our settings, and return those that differ."""
        groups, saved = self.optimizer.param_groups, state["scheduler"]
        ours = [{key: group[key] for key in KEPT_IN_GROUPS if key in group} for group in groups]
        for group, settings in zip(groups, ours, strict=True):
            # Megatron-Core 0.19 knows a checkpoint's group by its settings, the rates among them.
            group.update({key: saved[key] for key in settings if key in saved})
        self.optimizer.load_state_dict(self._as_chained_here(state["optimizer"]))
        groups = self.optimizer.param_groups
        changed = changed_settings(
            saved, self.scheduler.state_dict(), groups[0] if groups else {}, ours[0] if ours else {}
        )
        for group, settings in zip(groups, ours, strict=True):
            group.update(settings)
        set_schedule(self.scheduler, self.num_updates)
        return changed

    def _as_chained_here(self, saved: dict[Any, Any]) -> dict[Any, Any]:
        """Return a checkpoint's optimizer state with as many parts as there are optimizers here.

        Experts that are shared out over ranks have an optimizer of their own, others have not. What belongs to parameters has
        been loaded into our parts, by name; of a part's plain data only the count of its steps is not ours.
        """
        parts = self.optimizer.chained_optimizers
        was_split = "optimizer" not in saved
        if was_split == (len(parts) > 1):
            return saved
        plain = saved[0] if was_split else saved
        steps = {key: value for key, value in plain["optimizer"]["param_groups"][0].items() if key == "step"}
        found = {}
        for number, part in enumerate(parts):
            groups = [group | steps for group in part.state_dict()["optimizer"]["param_groups"]]
            loaded = saved if was_split else saved[number]
            found[number] = {
                "optimizer": {"param_groups": groups},
                "param_state_sharding_type": plain["param_state_sharding_type"],
                "param_state": loaded["param_state"],
            }
        return found if len(parts) > 1 else found[0]
