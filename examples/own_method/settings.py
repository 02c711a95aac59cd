"""Settings of the method in method.py: ``algorithm.name: settings:RunningMeanConfig``. Read before torch is loaded."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from megatron_rl.config import GroupConfig, section


@section
class RunningMeanConfig(GroupConfig):
    """Groups of rollouts, clip ranges, KL and token selection come from ``GroupConfig``; this adds a field of its own."""

    implementation: ClassVar[str] = "method:RunningMean"
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old mean that a step keeps."""
