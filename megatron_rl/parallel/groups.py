"""The one reader of Megatron's parallel state: everything else receives the groups that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Groups:
    """This rank's process groups. A group's name carries its axis."""

    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    """Ranks that differ only in their rows."""
    dp_cp_group: dist.ProcessGroup
    """Ranks with the same weights, except for experts."""
    ep_group: dist.ProcessGroup
    """Ranks that hold different experts of a layer."""
    etp_group: dist.ProcessGroup
    """Ranks that share each expert."""
    cpu_group: dist.ProcessGroup
    """All ranks, over gloo: for host data (prompts, rollouts, flags)."""
    device: torch.device

    @property
    def dp_size(self) -> int:
        """Number of copies of the model."""
        return dist.get_world_size(self.dp_group)

    @property
    def dp_rank(self) -> int:
        """Index of this rank's copy of the model."""
        return dist.get_rank(self.dp_group)

    @property
    def tp_size(self) -> int:
        """Ranks that share each layer."""
        return dist.get_world_size(self.tp_group)

    @property
    def tp_rank(self) -> int:
        """Rank among them."""
        return dist.get_rank(self.tp_group)

    @property
    def cp_size(self) -> int:
        """Ranks that share each sequence."""
        return dist.get_world_size(self.cp_group)

    @property
    def cp_rank(self) -> int:
        """Rank among them."""
        return dist.get_rank(self.cp_group)

    @property
    def ep_size(self) -> int:
        """Ranks that hold different experts of a layer."""
        return dist.get_world_size(self.ep_group)

    @property
    def ep_rank(self) -> int:
        """Rank among them."""
        return dist.get_rank(self.ep_group)

    @property
    def etp_size(self) -> int:
        """Ranks that share each expert."""
        return dist.get_world_size(self.etp_group)

    @property
    def etp_rank(self) -> int:
        """Rank among them."""
        return dist.get_rank(self.etp_group)

    @property
    def pp_size(self) -> int:
        """Number of pipeline stages."""
        return dist.get_world_size(self.pp_group)

    @property
    def pp_rank(self) -> int:
        """Index of this rank's pipeline stage."""
        return dist.get_rank(self.pp_group)

    @property
    def is_last_stage(self) -> bool:
        """True on the last pipeline stage, which computes the losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def rank(self) -> int:
        """Rank among all ranks of the run."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of all ranks of the run."""
        return dist.get_world_size()


def build_groups(
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    virtual_pipeline_size: int = 1,
    context_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    device: torch.device,
    seed: int,
    timeout_s: float = 1800.0,
) -> Groups:
    """Create Megatron's model-parallel groups and seed its generators. Needs an initialised ``torch.distributed``.

    Args:
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: ranks that share the layers out.
        virtual_pipeline_size: chunks of layers on each of these.
        context_parallel_size: ranks that share each sequence.
        expert_parallel_size: ranks that share the experts of a layer out.
        expert_tensor_parallel_size: ranks that share each expert; None: as many as share each layer.
        device: where this rank's model lives.
        seed: of Megatron's model-parallel generators (dropout, random initialisation).
        timeout_s: of every collective in these groups; a new group does not take over the timeout of the default one. A
            run passes ``trainer.timeout_s``; what is here serves tests and benchmarks.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size if virtual_pipeline_size > 1 else None,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_s / 60,  # Megatron says int, and makes a timedelta of it
    )
    model_parallel_cuda_manual_seed(seed)
    timeout = timedelta(seconds=timeout_s)
    cpu_group = dist.group.WORLD if _is_gloo() else dist.new_group(backend="gloo", timeout=timeout)
    assert cpu_group is not None
    return Groups(
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        cpu_group=cpu_group,
        device=device,
    )


def _is_gloo() -> bool:
    """Return whether the default group runs over gloo, and so carries host data."""
    return dist.get_backend() == "gloo"
