"""The methods, one file a method; what they are made of is in ``parts/``. Their settings are in ``config/methods/``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rl import plugins
from megatron_rl.errors import UserError

if TYPE_CHECKING:  # nothing here loads torch: a config check looks for implementations in this folder
    from megatron_rl.algorithms.base import Algorithm
    from megatron_rl.config import Config


def build_algorithm(config: Config) -> Algorithm:
    """Build the method that ``algorithm.name`` asks for.

    Raises:
        UserError: its implementation cannot be imported, is no ``Algorithm``, or needs what nothing fills.
    """
    from megatron_rl.algorithms.base import Algorithm, OnlineAlgorithm
    from megatron_rl.algorithms.parts.base import NEEDS

    settings = config.algorithm
    with plugins.named_by(settings.name, settings.implementation, field="algorithm.name"):
        found = plugins.load(settings.implementation, field="algorithm.name", what="a method")
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise UserError(
            "algorithm.name",
            settings.name,
            f"is implemented by {settings.implementation}, which is no Algorithm",
            "inherit from megatron_rl.algorithms.base.Algorithm, or from one of our methods",
        )
    with plugins.named_by(settings.name, settings.implementation, field="algorithm.name"):
        plugins.check_call(found, settings.implementation, ("config",), field="algorithm.name")
    algorithm = found(config)
    if settings.stage == "rl" and not isinstance(algorithm, OnlineAlgorithm):
        raise UserError(
            "algorithm.name",
            settings.name,
            f"is implemented by {settings.implementation}, which collects no rollouts",
            "inherit from megatron_rl.algorithms.base.OnlineAlgorithm, or set the class variable stage to sft",
        )
    if not algorithm.needs <= NEEDS:
        raise UserError(
            "algorithm.name",
            settings.name,
            f"is implemented by {settings.implementation}, which needs {', '.join(sorted(algorithm.needs - NEEDS))}",
            f"nothing fills that; needs are some of {', '.join(sorted(NEEDS))}",
        )
    return algorithm
