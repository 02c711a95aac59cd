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
    path = getattr(found, "implementation", None)
    if path is None:
        raise UserError(
            "algorithm.name",
            name,
            "does not say which class implements the method",
            'give the settings a class variable: implementation = "package.module:Class"',
        )
    plugins.check(path, field="algorithm.name", what=f"the implementation of {name}")
    return found


def names_of_stage(stage: Stage) -> list[str]:
    """Return our methods that a loop can run."""
    return [name for name, settings in METHODS.items() if settings.stage == stage]
