"""The policy: model, optimizer and schedule behind three verbs: ``fill_log_probs``, ``train_step``, and state for others.

Samples are the same on every rank; each data-parallel rank computes its share of the rows, and what comes out is shared
again. So everything between two calls of this class is plain data, equal everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.data.pack import pack, pack_layout, plan_micro_batches, unpack
from megatron_rl.errors import UserError
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.model.build import build_chunks
from megatron_rl.model.forward import PolicyModel, run_model
from megatron_rl.model.guards import check_finite, check_log_probs, check_same_rows, check_trainable
from megatron_rl.model.offload import UpdateMemory
from megatron_rl.model.specs import has_transformer_engine
from megatron_rl.parallel.agree import gather_json
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import ON_POLICY, Kind, MicroBatch, TrainingSample

LossFunction = Callable[[Tensor, Tensor, MicroBatch], TokenTerms]
"""(log_probs [T], entropy [T], micro_batch) -> terms."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}
"""Names in ``policy.optim.optimizer_cfg``; Megatron spells eight bits so."""
_NO_DECAY = 1_000_000_000
"""Megatron's spelling of ``decay_updates: null``: further than any run goes."""
_SCHEDULE_FIELDS = {
    "max_lr": "lr",
    "min_lr": "min_lr",
    "start_wd": "weight_decay",
    "lr_decay_style": "sched.name",
    "lr_warmup_steps": "sched.warmup_updates",
    "lr_decay_steps": "sched.decay_updates",
}
"""Megatron's name of a setting in the state of its scheduler -> ours, under ``policy.optim``."""
_GROUP_FIELDS = {"betas": "adam_beta1 and adam_beta2", "eps": "adam_eps"}
"""The same for settings that only the optimizer's parameter groups hold."""


class Policy:
    """The trained model of this rank, its optimizer, and how rows flow through it."""

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        groups: Groups,
        *,
        fill_weights: Callable[[Sequence[PolicyModel]], None],
        timer: Any,
    ) -> None:
        """Build model and optimizer.

        Args:
            config: of the run.
            shape: of the model.
            groups: process groups.
            fill_weights: puts the initial weights into the bare model; called before the optimizer copies them.
            timer: ``PhaseTimer``.
        """
        check_optimizer(config, groups.device)
        self.config, self.shape, self.groups, self.timer = config, shape, groups, timer
        self.chunks: list[PolicyModel] = build_chunks(config, shape, groups)
        """This rank's part of the model: one, or several under virtual pipelining."""
        fill_weights(self.chunks)
        self.megatron_config = self.chunks[0].config
        self.models = [self._wrap(chunk, is_first=index == 0) for index, chunk in enumerate(self.chunks)]
        self.optimizer = get_megatron_optimizer(self._optimizer_config(), self.models)
        self.scheduler = self._scheduler()
        self.update_memory = UpdateMemory(self._gradient_buffers(), self.optimizer, self._parameters())
        """Gradients and optimizer state: to be released while rollouts are sampled. What needs them brings them back."""
        self.num_updates = 0
        self._set_schedule()
        self.megatron_config.finalize_model_grads_func = finalize_model_grads
        self.megatron_config.grad_scale_func = self.optimizer.scale_loss
        if self.models[0].ddp_config.overlap_grad_reduce:
            no_sync = [model.no_sync for model in self.models]
            self.megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    # ------------------------------------------------------------------------------------------------ the two verbs

    def fill_log_probs(
        self,
        samples: Sequence[TrainingSample],
        mini_batches: Sequence[Sequence[int]],
        name: str,
        *,
        with_entropy: bool = False,
    ) -> None:
        """Set ``name`` (``old_log_probs`` or ``ref_log_probs``, [R] float32) of every sample that lacks it, by forward passes.

        Args:
            samples: all rows of the step, on every rank.
            mini_batches: the row indices of each coming update. Rows run here in exactly the packs in which they will be
                trained on, so that before the first update both passes give the same bits.
            name: the field to fill.
            with_entropy: set ``entropy`` as well; it costs nothing more.

        Raises:
            UserError: ranks have different rows, or a value is not finite; on all ranks.
        """
        check_same_rows(samples, update=self.num_updates + 1, cpu_group=self.groups.cpu_group)
        fields = {name: "log_probs", **({"entropy": "entropy"} if with_entropy else {})}
        for rows in mini_batches:
            chosen = [samples[row] for row in rows]
            micro_batches = self._micro_batches(chosen)
            for model in self.models:
                model.eval()
            with torch.no_grad(), self.timer("log_probs"):
                outputs = self._run(micro_batches, _return_log_probs, forward_only=True)
            with self.timer("log_probs"):
                self._keep(outputs, fields, micro_batches, chosen)

    def train_step(self, samples: Sequence[TrainingSample], loss_function: LossFunction) -> dict[str, float]:
        """One optimizer update on one mini-batch; every sample carries its ``weights``.

        RL and replay rows that have no ``old_log_probs`` yet (all of them or none) get those of this very pass, before the
        update: a pass of ``fill_log_probs`` over the same packs would give the same bits.

        Returns:
            Metrics over the whole mini-batch, the same on every rank: ``loss``, ``grad_norm``, ``lr``, and what the loss
            reports.

        Raises:
            UserError: ranks have different rows, no token is trained on, or the loss or a gradient is not finite; on all
                ranks, before any weight has changed.
        """
        with self.timer("offload"):
            self.update_memory.resume()
        update = self.num_updates + 1
        check_same_rows(samples, update=update, cpu_group=self.groups.cpu_group)
        check_trainable(samples, update=update)
        # Megatron divides gradients by the integer number of loss tokens of the mini-batch; multiplying by it here leaves
        # exactly sum(weight * term).
        num_tokens = {
            kind: sum(s.num_loss_tokens for s in samples if s.kind is kind) for kind in {s.kind for s in samples}
        }
        num_global_tokens = sum(num_tokens.values())
        micro_batches = self._micro_batches(samples)
        is_own_past = any(sample.kind in ON_POLICY and sample.old_log_probs is None for sample in samples)

        def weighted_loss(log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict]:
            if is_own_past:
                batch.vectors["old_log_probs"] = log_probs.detach()
            terms = loss_function(log_probs, entropy, batch)
            loss = (terms.loss * batch.vectors["weights"]).sum()
            output = _report(terms, batch, num_tokens, loss) | {"log_probs": log_probs.detach()}
            return loss * num_global_tokens, batch.loss_mask.sum().int(), output

        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.timer("forward_backward"):
            # Megatron will divide auxiliary losses of experts by the same count.
            row_weight = num_global_tokens / len(samples)
            outputs = self._run(micro_batches, weighted_loss, forward_only=False, row_weight=row_weight)
            if is_own_past:
                self._keep(outputs, {"old_log_probs": "log_probs"}, micro_batches, samples)
        metrics = self._reduce_reports(outputs)
        gradients = (buffer.grad_data for buffer in self._gradient_buffers())
        check_finite(metrics["loss"], gradients, update=update, cpu_group=self.groups.cpu_group)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        with self.timer("optimizer"):
            _, grad_norm, _ = self.optimizer.step()
            self.num_updates += 1
            self._set_schedule()
        return metrics | {"grad_norm": float(grad_norm or 0.0), "lr": learning_rate}

    # ------------------------------------------------------------------------------------------------ other weights

    def snapshot(self) -> list[Tensor]:
        """A copy of this rank's weights, on the CPU."""
        return [parameter.detach().to("cpu", copy=True) for parameter in self._parameters()]

    @contextmanager
    def weights_of(self, snapshot: Sequence[Tensor]):  # type: ignore[no-untyped-def]
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
            for parameter, value in zip(self._parameters(), weights, strict=True):
                parameter.copy_(value)

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Take over weights, optimizer state and count of updates of a checkpoint, under the settings of our own config.

        Megatron would go on with the checkpoint's settings: they are in its scheduler's state, and its parameter groups
        carry a copy of each. The schedule itself needs no state: it follows from the settings and the count of updates.

        Returns:
            The settings that differ from the checkpoint's, such as ``policy.optim.lr 0.001 -> 0.0005``.
        """
        assert not self.update_memory.is_released
        for chunk, weights in zip(self.chunks, state["model"], strict=True):
            chunk.load_state_dict(weights)
        kept = ("max_lr", "min_lr", "start_wd", "end_wd", *_GROUP_FIELDS)
        ours = [{key: group[key] for key in kept if key in group} for group in self.optimizer.param_groups]
        for group, settings in zip(self.optimizer.param_groups, ours, strict=True):
            # Megatron-Core 0.19 knows a checkpoint's group by its settings, the rates among them.
            group.update({key: state["scheduler"][key] for key in settings if key in state["scheduler"]})
        self.optimizer.load_state_dict(state["optimizer"])
        changed = self._changed_settings(state["scheduler"], ours[0] if ours else {})
        for group, settings in zip(self.optimizer.param_groups, ours, strict=True):
            group.update(settings)
        self.num_updates = state["num_updates"]
        self._set_schedule()
        return changed

    # ------------------------------------------------------------------------------------------------ private

    def _wrap(self, chunk: PolicyModel, *, is_first: bool) -> DistributedDataParallel:
        wrapped = Float16Module(self.megatron_config, chunk) if self.config.trainer.precision == "bf16" else chunk
        # Gradients of later chunks come first, and those of the first chunk last: only there is one bucket at a time.
        return DistributedDataParallel(
            self.megatron_config, self._ddp_config(), wrapped, disable_bucketing=not is_first
        )

    def _gradient_buffers(self) -> Iterator[Any]:
        for model in self.models:
            yield from model.buffers
            yield from model.expert_parallel_buffers

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        for chunk in self.chunks:
            yield from chunk.parameters()

    def _changed_settings(self, saved_schedule: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
        """``field old -> new``, while the parameter groups still hold the old values."""
        now, groups = self.scheduler.state_dict(), self.optimizer.param_groups
        pairs = [(name, saved_schedule[key], now[key]) for key, name in _SCHEDULE_FIELDS.items()]
        pairs += [(name, groups[0][key], ours[key]) for key, name in _GROUP_FIELDS.items() if key in ours]
        return [
            f"policy.optim.{name} {_shown(old)} -> {_shown(new)}"
            for name, old, new in pairs
            if _shown(old) != _shown(new)
        ]

    def _set_schedule(self) -> None:
        """Set the rates of the next update, from the count of those done."""
        self.scheduler.num_steps = 0
        # Update i runs at point i of the schedule. Megatron's own loop would run it at i - 1: a first update of a warm-up
        # at rate 0 changes nothing.
        self.scheduler.step(self.num_updates + 1)

    def _micro_batches(self, samples: Sequence[TrainingSample]) -> list[MicroBatch]:
        """This data-parallel rank's packs: a pure function of the rows, so each pass over them sees the same packs."""
        with self.timer("pack"):
            groups = self.groups
            layout = pack_layout(self.config.policy, cp_rank=groups.cp_rank)
            plan = plan_micro_batches(
                [layout.padded(sample.num_tokens) for sample in samples],
                num_ranks=groups.dp_size,
                max_tokens=self.config.policy.train_micro_batch_tokens,
                # The interleaved schedule deals micro-batches out in groups of the pipeline's size.
                count_multiple=groups.pp_size if len(self.chunks) > 1 else 1,
                # Of a layer's 12 H^2 weights each costs as much a token as 12 H keys do.
                quadratic_length=12 * self.shape.hidden_size,
            )
            packs = [pack(samples, rows, layout) for rows in plan[groups.dp_rank]]
            return [batch.to(self.groups.device) for batch in packs]

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_function: Callable,
        *,
        forward_only: bool,
        row_weight: float = 0.0,
    ) -> list[dict]:
        """Megatron's schedule over the packs. The last stage gets the loss function's reports; others an empty list."""

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

    def _keep(
        self,
        outputs: Sequence[dict],
        fields: Mapping[str, str],
        micro_batches: Sequence[MicroBatch],
        samples: Sequence[TrainingSample],
    ) -> None:
        """Write vectors of the outputs (field of a sample -> key of an output) into the samples, on every rank.

        Only the last stage of one data-parallel rank has computed any given row. A row keeps what it has already.
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

    def _reduce_reports(self, outputs: Sequence[dict]) -> dict[str, float]:
        """Sum (or take the maximum of) the reports of all micro-batches of all data-parallel ranks, in float64."""
        sums: dict[str, Tensor] = {}
        maxima: dict[str, Tensor] = {}
        for output in outputs:
            for key, value in output["sums"].items():
                sums[key] = sums.get(key, 0.0) + value
            for key, value in output["maxima"].items():
                maxima[key] = torch.maximum(maxima[key], value) if key in maxima else value
        is_owner = self.groups.is_last_stage and self.groups.tp_rank == 0
        mine = ([float(v) for v in sums.values()], [float(v) for v in maxima.values()]) if is_owner else None
        gathered = gather_json([mine, list(sums), list(maxima)], self.groups.cpu_group)
        reports = [values for values, _, _ in gathered if values is not None]
        sum_keys, max_keys = next((s, m) for values, s, m in gathered if values is not None)
        totals = dict(zip(sum_keys, map(math.fsum, zip(*(r[0] for r in reports)))))
        return totals | dict(zip(max_keys, map(max, zip(*(r[1] for r in reports)))))

    def _ddp_config(self) -> DistributedDataParallelConfig:
        settings = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True}
        return DistributedDataParallelConfig(**(settings | self.config.policy.ddp_cfg))

    def _optimizer_config(self) -> OptimizerConfig:
        optim = self.config.policy.optim
        settings = {
            "optimizer": optim.name,
            "lr": optim.lr,
            "min_lr": optim.min_lr,
            "weight_decay": optim.weight_decay,
            "clip_grad": optim.clip_grad,
            "adam_beta1": optim.adam_beta1,
            "adam_beta2": optim.adam_beta2,
            "adam_eps": optim.adam_eps,
            "bf16": self.config.trainer.precision == "bf16",
            "params_dtype": self.megatron_config.params_dtype,
            "use_distributed_optimizer": True,
        }
        known = {f.name for f in fields(OptimizerConfig)}
        passed = {name: _torch_dtype(name, value) for name, value in optim.optimizer_cfg.items()}
        return OptimizerConfig(**({k: v for k, v in settings.items() if k in known} | passed))

    def _scheduler(self) -> OptimizerParamScheduler:
        optim, sched = self.config.policy.optim, self.config.policy.optim.sched
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0 if sched.warmup_updates else optim.lr,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=sched.warmup_updates,
            lr_decay_steps=sched.decay_updates or max(sched.warmup_updates + 1, _NO_DECAY),
            lr_decay_style=sched.name,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )


def check_optimizer(config: Config, device: torch.device) -> None:
    """Refuse what Megatron's optimizer has for GPUs, or with Transformer Engine's Adam, alone.

    Raises:
        UserError: naming the setting.
    """
    passed, is_gpu = config.policy.optim.optimizer_cfg, device.type == "cuda"
    for field, can_run, rule in (
        ("optimizer_cpu_offload", is_gpu, "moves what is on a GPU; this run has none"),
        ("use_precision_aware_optimizer", is_gpu and has_transformer_engine(), "needs Transformer Engine on a GPU"),
    ):
        if passed.get(field) and not can_run:
            raise UserError(f"policy.optim.optimizer_cfg.{field}", True, rule, "leave it out")


def _torch_dtype(field: str, value: Any) -> Any:
    """YAML has names where Megatron wants types: ``exp_avg_dtype: bf16``."""
    return DTYPES[value] if field.endswith("_dtype") else value


def _shown(setting: Any) -> str:
    """As in the config, whichever container a checkpoint gives back."""
    return "null" if setting == _NO_DECAY else str(list(setting) if isinstance(setting, tuple) else setting)


def _report(terms: TokenTerms, batch: MicroBatch, num_tokens: Mapping[Kind, int], loss: Tensor) -> dict[str, Any]:
    """This micro-batch's part of each mean over the mini-batch, and its maxima; ``num_tokens`` are the mini-batch's."""
    present = frozenset(num_tokens)
    masks: dict[frozenset[Kind], Tensor] = {present: batch.loss_mask}

    def tokens_of(name: str) -> tuple[Tensor, int]:
        kinds = present & terms.kinds.get(name, present)
        if kinds not in masks:
            chosen = torch.tensor(sorted(map(int, kinds)), device=batch.kind.device, dtype=batch.kind.dtype)
            masks[kinds] = batch.loss_mask & torch.isin(batch.kind, chosen)
        return masks[kinds], sum(num_tokens[kind] for kind in kinds)

    sums, maxima = {"loss": loss.detach().double()}, {}
    for name, value in terms.means.items():
        mask, count = tokens_of(name)
        if count:  # a mean over no token is no number
            sums[name] = value.detach()[mask].double().sum() / count
    for name, value in terms.maxima.items():
        mask, count = tokens_of(name)
        if (
            count
        ):  # not value[mask].max(): a micro-batch without such tokens has no maximum, but the ranks go on together
            maxima[name] = value.detach().double().masked_fill(~mask, -math.inf).max()
    return {"sums": sums, "maxima": maxima}


def _return_log_probs(log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict]:
    """A loss function of a forward-only pass: nothing to minimise, the vectors are the report."""
    return log_probs.sum(), batch.loss_mask.sum().int(), {"log_probs": log_probs, "entropy": entropy}
