"""The way out where a config does not fit its GPUs: the cheapest of the settings of docs/memory.md that makes it fit.

Each setting has a price, a rough share of a step's time; combinations are tried from the cheapest to the dearest. A
combination is a ``Config`` of its own, so it has passed all checks of a config before it is suggested.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from megatron_rl.config import Config, check_shape, read_model_shape
from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.doctor.memory import FULL, GB, estimate, longest_row
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.layouts import rollout_layout

if TYPE_CHECKING:
    from megatron_rl.parallel.groups import Groups

PRICES = {
    "tensor": 0.06, "experts": 0.05, "server": 0.04, "tokens": 0.03, "rollouts": 0.05, "rows": 0.05, "selective": 0.08,
    "full": 0.30, "sums": 0.10, "moments": 0.12, "offload": 0.60,
}  # fmt: skip
"""Rough shares of a step's time: of each doubling of a parallel size, each halving of a micro-batch, and each other setting.
What costs precision has a price as well (``sums``, ``moments``). Not measured; only their order matters."""
ROW_STEP = 512
"""A suggested micro-batch is a multiple of it, which leaves room for the padding of rows."""
MODEL, DDP, OPTIMIZER = "policy.megatron_cfg", "policy.ddp_cfg", "policy.optim.optimizer_cfg"

Changes = Mapping[str, Any]
"""Dotted field -> new value."""


@dataclass(frozen=True)
class Advice:
    """The cheapest settings that fit, or how far the best are from it."""

    changes: Changes
    """Empty if nothing that was tried saves anything."""
    needed: int
    """Bytes on the fullest GPU with them."""
    missing: int
    """Bytes that are still too many; 0 if they fit."""

    @property
    def line(self) -> str:
        """The settings as overrides for the command line."""
        return " ".join(shlex.quote(f"{field}={_yaml(value)}") for field, value in self.changes.items())

    def __str__(self) -> str:
        if not self.missing:
            return f"fits in {self.needed / GB:.1f} GB with: {self.line}"
        with_it = f", with {self.line}" if self.changes else ""
        return f"no setting that was tried fits: {self.missing / GB:.1f} GB are missing at best{with_it}"


def advise(config: Config, gpu_bytes: float, *, shape: ModelShape | None = None, longest: int | None = None) -> Advice:
    """Find the cheapest settings with which a run fits; a tenth is left free if any settings can do that.

    Args:
        config: the run's, which does not fit.
        gpu_bytes: of one GPU.
        shape: of the model; None reads it.
        longest: tokens of the longest row. None takes ``data.max_prompt_tokens`` and ``rollout.max_new_tokens``; without the
            first, micro-batches stay as they are.
    """
    shape = read_model_shape(config) if shape is None else shape
    known = longest
    if known is None and config.data.max_prompt_tokens is not None and config.trainer.stage == "rl":
        known = longest_row(config)
    options = [list(kind) for kind in _options(config, shape, known)]
    combinations = sorted(product(*options), key=lambda each: sum(price for price, _ in each))
    just_fits: Advice | None = None
    best = Advice({}, *_needs(config, shape, gpu_bytes, longest))
    for combination in combinations:
        changes = {field: value for _, part in combination for field, value in part.items()}
        with suppress(UserError):  # the checks refuse it
            changed = with_changes(config, changes)
            check_shape(changed, shape)
            if changed.rollout.is_colocated and shape.latent is None:
                rollout_layout(changed).check(shape)
            advice = Advice(changes, *_needs(changed, shape, gpu_bytes, longest))
            if advice.needed <= FULL * gpu_bytes:
                return advice
            if not advice.missing and just_fits is None:
                just_fits = advice
            best = min(best, advice, key=lambda each: each.needed)
    return just_fits or best


def check_gpu(config: Config, shape: ModelShape, groups: Groups, *, longest: int) -> None:
    """Check at the start of a run that this rank's part of the model fits its GPU, unless the config says not to, or has none.

    Raises:
        UserError: as ``check_fits``.
    """
    if groups.device.type == "cuda" and config.trainer.check_memory:
        import torch

        total = torch.cuda.get_device_properties(groups.device).total_memory
        check_fits(config, shape, rank=groups.rank, stage=groups.pp_rank, gpu_bytes=total, longest=longest)


def check_fits(
    config: Config, shape: ModelShape, *, rank: int, stage: int, gpu_bytes: int, longest: int | None = None
) -> None:
    """Check that a rank's part of the model fits a GPU.

    Args:
        config: the run's.
        shape: of the model.
        rank: whose GPU it is.
        stage: pipeline stage of that rank.
        gpu_bytes: what the GPU has.
        longest: tokens of the longest row.

    Raises:
        UserError: it does not fit. The fix has settings with which it would.
    """
    memory = estimate(config, shape, longest=longest)[stage]
    if memory.needed <= gpu_bytes:
        return
    phase = "updating" if memory.updating == memory.needed else "sampling"
    advice = advise(config, gpu_bytes, shape=shape, longest=longest)
    way_out = f"add {advice.line}" if not advice.missing else f"{advice}: use more or larger GPUs"
    raise UserError(
        f"GPU of rank {rank}",
        f"{gpu_bytes / GB:.1f} GB",
        f"pipeline stage {stage} needs {memory.needed / GB:.1f} GB while {phase}, as docs/memory.md estimates it",
        f"{way_out}; trainer.check_memory=false tries it as it is",
    )


def _needs(config: Config, shape: ModelShape, gpu_bytes: float, longest: int | None) -> tuple[int, int]:
    """Return the bytes that are needed, and how many too many those are."""
    needed = max(memory.needed for memory in estimate(config, shape, longest=longest))
    return needed, max(0, round(needed - gpu_bytes))


def with_changes(config: Config, changes: Changes) -> Config:
    """Return the config with other values, checked as a whole.

    Raises:
        UserError: the values do not go with others.
    """
    tree: dict[str, Any] = {}
    for field, value in changes.items():
        *sections, name = field.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return _changed(config, tree)


def _changed(section: Any, tree: Mapping[str, Any]) -> Any:
    if isinstance(section, Mapping):
        return {**section, **tree}
    new = {name: _changed(getattr(section, name), v) if isinstance(v, dict) else v for name, v in tree.items()}
    return replace(section, **new)


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------- what is tried

Option = tuple[float, Changes]
"""Price and settings; the first of a kind changes nothing."""


def _options(config: Config, shape: ModelShape, longest: int | None) -> Iterator[Iterator[Option]]:
    """Yield the choices of each kind of setting."""
    yield _recomputation(config, shape)
    yield _tensor_parallel(config)
    yield _expert_parallel(config, shape)
    yield _micro_batches(config, longest)
    yield _optimizer(config)
    yield _sums(config)
    yield _room_for_rollouts(config)
    yield _rollouts(config)


def _recomputation(config: Config, shape: ModelShape) -> Iterator[Option]:
    yield 0.0, {}
    passed = config.policy.megatron_cfg
    if passed.get("recompute_granularity") == "full" or passed.get("cpu_offloading"):
        return
    modules = ["moe"] if shape.num_experts and not shape.num_dense_layers else ["mlp"]
    if passed.get("recompute_granularity") is None:
        yield (
            PRICES["selective"],
            {f"{MODEL}.recompute_granularity": "selective", f"{MODEL}.recompute_modules": modules},
        )
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if passed.get("recompute_modules") is not None:
        full["recompute_modules"] = None  # null leaves it out
    yield PRICES["full"], {f"{MODEL}.{name}": value for name, value in full.items()}


def _tensor_parallel(config: Config) -> Iterator[Option]:
    """Yield sizes within a node."""
    yield 0.0, {}
    policy, devices = config.policy, config.trainer.devices
    size, price = policy.tensor_parallel_size, 0.0
    spread = {f"{MODEL}.sequence_parallel": True}
    if size > 1 and not policy.megatron_cfg.get("sequence_parallel"):
        yield 0.0, spread
    while (size := 2 * size) <= devices:
        price += PRICES["tensor"]
        if devices % size == 0:
            yield price, {f"{MODEL}.tensor_model_parallel_size": size, **spread}


def _expert_parallel(config: Config, shape: ModelShape) -> Iterator[Option]:
    yield 0.0, {}
    size, price = config.policy.expert_parallel_size, 0.0
    while (size := 2 * size) <= min(shape.num_experts, config.trainer.world_size):
        price += PRICES["experts"]
        yield price, {f"{MODEL}.expert_model_parallel_size": size}


def _micro_batches(config: Config, longest: int | None) -> Iterator[Option]:
    """Yield sizes down to the longest row."""
    yield 0.0, {}
    if longest is None:
        return
    rows = 2 if config.algorithm.has_uneven_groups else 1
    least = -(-rows * longest // ROW_STEP) * ROW_STEP
    tokens, price = config.policy.train_micro_batch_tokens, 0.0
    while tokens > least:
        tokens, price = max(least, tokens // 2), price + PRICES["tokens"]
        yield price, {"policy.train_micro_batch_tokens": tokens}


def _optimizer(config: Config) -> Iterator[Option]:
    yield 0.0, {}
    passed = config.policy.optim.optimizer_cfg
    if config.trainer.precision != "bf16" or passed.get("optimizer_cpu_offload"):
        return
    aware = {f"{OPTIMIZER}.use_precision_aware_optimizer": True}
    if not passed.get("use_precision_aware_optimizer"):
        yield (
            PRICES["moments"],
            {**aware, f"{OPTIMIZER}.exp_avg_dtype": "bf16", f"{OPTIMIZER}.exp_avg_sq_dtype": "bf16"},
        )
    offload = {f"{OPTIMIZER}.optimizer_cpu_offload": True, f"{OPTIMIZER}.optimizer_offload_fraction": 1.0}
    yield PRICES["offload"], {**aware, **offload}


def _sums(config: Config) -> Iterator[Option]:
    yield 0.0, {}
    if config.trainer.precision == "bf16" and config.policy.ddp_cfg.get("grad_reduce_in_fp32", True):
        yield PRICES["sums"], {f"{DDP}.grad_reduce_in_fp32": False}


def _room_for_rollouts(config: Config) -> Iterator[Option]:
    yield 0.0, {}
    if not config.offloads_during_rollouts:
        yield PRICES["rollouts"], {"trainer.offload_during_rollouts": True}


def _rollouts(config: Config) -> Iterator[Option]:
    """Yield what makes rollouts smaller: fewer rows at once in process, servers over more GPUs, then over more nodes."""
    yield 0.0, {}
    rollout, devices, price = config.rollout, config.trainer.devices, 0.0
    if rollout.engine == "transformers":
        for rows in (rollout.max_batch_size // 2, rollout.max_batch_size // 4, rollout.max_batch_size // 8):
            price += PRICES["rows"]
            if rows:
                yield price, {"rollout.max_batch_size": rows}
    if not rollout.is_colocated:
        return
    size = rollout.gpus_per_server
    while (size := 2 * size) <= devices and devices % size == 0 and "pp_size" not in rollout.sglang_cfg:
        price += PRICES["server"]
        yield price, {"rollout.sglang_cfg.tp_size": size, "rollout.servers.num_per_node": devices // size}
    for nodes in (2, 4):
        if config.trainer.num_nodes % nodes == 0 and size // 2 <= devices and "pp_size" not in rollout.sglang_cfg:
            price += PRICES["server"]
            sizes = {"rollout.sglang_cfg.tp_size": nodes * devices, "rollout.servers.num_per_node": 1}
            yield price, {**sizes, "rollout.servers.nodes_per_server": nodes}
