"""Settings of the methods, one file a method. ``METHODS`` is the whole list; others are named by import path.

Adding a method of ours takes two new files and a line here: its settings (a subclass of ``MethodConfig``) in this folder, and
what ``implementation`` of these settings names. A method from outside needs none: ``algorithm.name=package.module:Settings``.
"""

from __future__ import annotations

from typing import Any

from megatron_rl import plugins
from megatron_rl.config.methods.base import MethodConfig, Stage
from megatron_rl.config.methods.dph_rl import DPHRLConfig
from megatron_rl.config.methods.grpo import GRPOConfig
from megatron_rl.config.methods.rlep import RLEPConfig
from megatron_rl.config.methods.sft import SFTConfig
from megatron_rl.config.methods.shared import ClippedConfig
from megatron_rl.config.methods.spo import SPOChainConfig, SPOTreeConfig
from megatron_rl.errors import UserError

METHODS: dict[str, type[MethodConfig]] = {
    "grpo": GRPOConfig,
    "dph_rl": DPHRLConfig,
    "rlep": RLEPConfig,
    "spo_chain": SPOChainConfig,
    "spo_tree": SPOTreeConfig,
    "sft": SFTConfig,
}


def find_method(name: Any) -> type[MethodConfig]:
    """Return the settings class that ``algorithm.name`` names; its implementation is there, too, but not imported.

    Raises:
        UserError: there is no such method, or what a path names is none.
    """
    if not isinstance(name, str):
        raise plugins.unknown(name, METHODS, field="algorithm.name", what="a method")
    found = plugins.find(name, METHODS, field="algorithm.name", what="a method")
    if not (isinstance(found, type) and issubclass(found, MethodConfig)):
        raise UserError(
            "algorithm.name",
            name,
            "names no settings of a method",
            "name a class that inherits from megatron_rl.config.MethodConfig, or from the settings of one of ours",
        )
    if "__dataclass_fields__" not in vars(found):
        raise UserError(
            "algorithm.name",
            name,
            "is a class whose fields nobody checks or saves",
            "decorate it with @section (from megatron_rl.config import section)",
        )
    path = getattr(found, "implementation", None)
    if path is None:
        raise UserError(
            "algorithm.name",
            name,
            "does not say which class implements the method",
            'give the settings a class variable: implementation = "package.module:Class"',
        )
    if found.stage == "rl" and not issubclass(found, ClippedConfig):
        raise UserError(
            "algorithm.name",
            name,
            "has no settings of rollouts and updates, which a method of trainer.stage rl needs",
            "inherit from megatron_rl.config.GroupConfig or ClippedConfig, or set the class variable stage to sft",
        )
    if found.stage == "rl" and found.num_rows is MethodConfig.num_rows:
        raise UserError("algorithm.name", name, "does not say how many rows a step has", "give it a property num_rows")
    plugins.check(path, field=f"implementation, in {name}", what="the implementation of a method")
    return found


def names_of_stage(stage: Stage) -> list[str]:
    """Return our methods that a loop can run."""
    return [name for name, settings in METHODS.items() if settings.stage == stage]
