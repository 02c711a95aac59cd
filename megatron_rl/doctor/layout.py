"""``megatron-rl doctor layout CONFIG``: does this config's layout give the exact gradient? Asked on a laptop, in a minute.

The config is scaled down: each parallel size above 1 becomes 2, the model becomes a small random one of the same kind, and
one update on the CPU, in as many gloo processes as that takes, is compared with a float64 model that has no layout
(``exactness``). What concerns loss, packing and layout stays as configured; what needs a GPU is left out, and named.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_rl.config import Config
from megatron_rl.errors import UserError

_GPU_ONLY = (
    "fp8", "fp4", "tp_comm", "cuda_graph", "enable_cuda_graph", "cpu_offloading", "fine_grained_activation",
    "transformer_impl", "use_te", "deallocate", "cross_entropy", "fused", "first_last_layers_bf16", "num_layers_at_",
    "cp_comm_type", "hierarchical_context", "attention_backend", "moe_enable_deepep", "moe_token_dispatcher_type",
    "moe_flex", "moe_hybridep", "gradient_accumulation_fusion",
)  # fmt: skip
"""Fields of Megatron's config that begin with one of these say nothing about a CPU run."""
_BOUND_BY_DEPTH = (
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "recompute_num_layers",
    "pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip
_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Scaled:
    """A config small enough for this machine."""

    config: Config
    sizes: dict[str, int]
    """Parallel sizes above 1 that are checked."""
    left_out: list[str]
    """Settings that are not."""


def scale_down(config: Config, model: Path) -> Scaled:
    """The config that is checked in place of ``config``, on the small model in ``model``."""
    policy, sizes = config.policy, {}
    passed: dict[str, Any] = {}
    left_out = ["Transformer Engine, NCCL and their kernels", "the optimizer's update"]
    left_out += ["bf16"] if config.trainer.precision == "bf16" else []
    left_out += [f"optimizer_cfg.{name}" for name in policy.optim.optimizer_cfg]
    left_out += ["router_replay"] if policy.router_replay else []
    for name, value in policy.megatron_cfg.items():
        if name in _BOUND_BY_DEPTH or name.startswith(_GPU_ONLY) or name.endswith("_fusion"):
            left_out.append(name)
        elif name not in _SIZES.values():
            passed[name] = value
    if passed.get("recompute_granularity") == "full":
        passed["recompute_num_layers"] = 1
    for axis, name in _SIZES.items():
        given = policy.megatron_cfg.get(name)
        if given is not None:
            passed[name] = min(int(given), 2)
            if int(given) > 1:
                sizes[axis] = 2
    if config.data_parallel_size > 1:
        sizes["dp"] = 2
    ranks = 1
    for axis in ("tp", "pp", "cp", "dp"):
        ranks *= sizes.get(axis, 1)
    num_rows = 8 * sizes.get("dp", 1)
    small = replace(
        config,
        trainer=replace(config.trainer, devices=ranks, num_nodes=1, precision="fp32", accelerator="cpu"),
        algorithm=config.algorithm.scaled_down(num_rows, num_stored=sizes.get("dp", 1)),
        policy=replace(
            policy,
            model_path=str(model),
            tokenizer_path=None,
            initialization="pretrained",
            megatron_cfg=passed,
            router_replay=False,
            optim=replace(policy.optim, clip_grad=0.0, optimizer_cfg={}),
            train_global_batch_size=num_rows,
            train_micro_batch_tokens=160,
        ),
    )
    return Scaled(small, sizes, left_out)


def check_layout(config: Config) -> bool:
    """Run the check and print what it found; True where everything is within its bound.

    Raises:
        UserError: the config's model cannot be read, or a process of the check failed.
    """
    # Before torch is loaded: as many processes as the layout needs share the cores, and torch cannot fork once it has seen a
    # GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    import torch
    from rich.console import Console
    from rich.table import Table

    import megatron_rl.patches
    from megatron_rl.config import read_model_shape

    warnings.filterwarnings("ignore")  # what upstream packages lack or deprecate is not news to our users
    torch.set_num_threads(1)
    source = config.policy.model_dir
    shape = read_model_shape(config)
    megatron_rl.patches.apply("cpu")
    from megatron_rl.doctor.exactness import BOUNDS, errors, gradient_errors
    from megatron_rl.doctor.small_model import write_small_model

    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scaled = scale_down(config, folder / "model")
        sizes = scaled.sizes
        num_layers = max(2, sizes.get("pp", 1) * sizes.get("vpp", 1))
        write_small_model(source, folder / "model", num_layers=num_layers, num_experts=4, seed=config.trainer.seed)
        layout = ", ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one rank"
        ranks = scaled.config.trainer.world_size
        console.print(f"checked: {layout}; {ranks} processes; a {shape.family} of {num_layers} layers, hidden size 64")
        console.print(f"not checked: {', '.join(scaled.left_out)}")
        _run(_reference, 1, scaled.config, folder)  # in a process of its own: torch cannot fork after a backward pass
        _run(_rank, ranks, scaled.config, folder)
        true = torch.load(folder / "true.pt", weights_only=True)
        found, first_ratio = torch.load(folder / "found.pt", weights_only=True)
    table = Table("", "error", "bound", "")
    is_exact = True
    ratios = {} if first_ratio is None else {"first log ratio": first_ratio}
    for what, error in (errors(found, true) | ratios).items():
        bound = BOUNDS.get(what, 0.0)
        is_good = error <= bound
        is_exact &= is_good
        table.add_row(what, f"{error:.1e}", f"{bound:.0e}", "ok" if is_good else "WRONG")
    console.print(table)
    if not is_exact:
        off = sorted(gradient_errors(found, true).items(), key=lambda item: -item[1])
        for parameter, error in [item for item in off if item[1] > BOUNDS["gradient"]][:10]:
            console.print(f"  {parameter}: {error:.1e}")
    return is_exact


def _reference(_rank: int, config: Config, folder: Path) -> None:
    import torch

    from megatron_rl.algorithms import build_algorithm
    from megatron_rl.doctor import exactness

    network = exactness.load_reference(config.policy.model_dir)
    temperature = config.rollout.temperature if config.trainer.stage == "rl" else 1.0
    lengths = exactness.LENGTHS * (config.policy.train_global_batch_size // len(exactness.LENGTHS))
    vocab_size = network.config.vocab_size
    algorithm = build_algorithm(config)
    batch = exactness.recorded_batch(
        network, algorithm, vocab_size=vocab_size, temperature=temperature, lengths=lengths
    )
    passed, row_loss = config.policy.megatron_cfg, None
    if hasattr(network.config, "num_experts_per_tok"):
        is_balanced = passed.get("moe_router_load_balancing_type") == "seq_aux_loss"
        row_loss = exactness.sequence_balance(
            float(passed.get("moe_aux_loss_coeff") or 0.0) if is_balanced else 0.0,
            float(passed.get("moe_z_loss_coeff") or 0.0),
            network.config.num_experts_per_tok,
        )
    true = exactness.reference(network, algorithm, batch, temperature=temperature, row_loss=row_loss)
    torch.save(batch, folder / "batch.pt")
    torch.save(true, folder / "true.pt")


def _run(work: Callable[[int, Config, Path], None], num_ranks: int, config: Config, folder: Path) -> None:
    """Call ``work(rank, config, folder)`` in that many processes; all end when one fails."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    try:
        start_processes(work, (config, folder), nprocs=num_ranks, start_method="fork")
    except (ProcessExitedException, ProcessRaisedException) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise UserError(
            "doctor layout", None, f"a process of the check failed: {lines[-1]}", "see the message above it"
        ) from error


def _rank(rank: int, config: Config, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from megatron_rl.algorithms import build_algorithm
    from megatron_rl.doctor.exactness import one_update
    from megatron_rl.types import RowKind, TrainingSample

    torch.set_num_threads(1)
    world_size = config.trainer.world_size
    store = dist.FileStore(str(folder / "store"), world_size)
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    policy, algorithm = build_policy(config), build_algorithm(config)
    with torch.serialization.safe_globals([TrainingSample, RowKind]):
        batch = torch.load(folder / "batch.pt", weights_only=True)
    # First as a rollout's first update sees it: log-probs of a pass of its own, then the same rows again.
    fresh = [replace(row, old_log_probs=None) for row in batch]
    policy.fill_log_probs(fresh, [range(len(fresh))], "old_log_probs")
    policy.trainable.optimizer.step = lambda: (True, 0.0, None)  # the weights shall stay for one_update
    ratio = policy.train_step(fresh, algorithm.loss).get("ratio/max_abs_log_ratio")
    del policy.trainable.optimizer.step
    found = one_update(policy, algorithm, batch)
    if rank == 0:
        torch.save((found, ratio), folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def build_policy(config: Config) -> Any:
    """A policy with the weights of its checkpoint, on this rank of a process group on the CPU."""
    from contextlib import nullcontext

    import torch

    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.convert.hf.reader import HFReader
    from megatron_rl.model.build import build_groups_of
    from megatron_rl.model.policy import Policy
    from megatron_rl.model.trainable import Trainable
    from megatron_rl.model.weights import load_hf_weights

    directory = config.policy.model_dir
    shape, groups = read_shape(directory), build_groups_of(config, torch.device("cpu"))
    trainable = Trainable(
        config,
        shape,
        groups,
        optim=config.policy.optim,
        fill_weights=lambda chunks: load_hf_weights(chunks, shape, groups, lambda: HFReader(directory)),
        timer=lambda _phase: nullcontext(),
    )
    return Policy(trainable)
