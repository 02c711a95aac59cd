"""Settings of the methods, one file a method. ``METHODS`` is the whole list; others are named by import path.

Adding a method of ours takes two new files and a line here: its settings (a subclass of ``MethodConfig``) in this folder, and
what ``implementation`` of these settings names. A method from outside needs none: ``algorithm.name=package.module:Settings``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_rl import plugins
from megatron_rl.config.methods.base import MethodConfig, Stage
from megatron_rl.config.methods.dph_rl import DPHRLConfig
from megatron_rl.config.methods.grpo import GRPOConfig
from megatron_rl.config.methods.rlep import RLEPConfig
from megatron_rl.config.methods.sft import SFTConfig
from megatron_rl.config.methods.shared import ClippedConfig
from megatron_rl.config.methods.spo import SPOChainConfig, SPOTreeConfig
from megatron_rl.errors import UserError, described, shortened

FIELD = "algorithm.name"
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
        raise plugins.unknown(name, METHODS, field=FIELD, what="a method")
    found = plugins.find(name, METHODS, field=FIELD, what="a method")
    if not (isinstance(found, type) and issubclass(found, MethodConfig)):
        raise UserError(
            FIELD,
            name,
            "names no settings of a method",
            "name a class that inherits from megatron_rl.config.MethodConfig, or from the settings of one of ours",
        )
    if "__dataclass_fields__" not in vars(found):
        raise UserError(
            FIELD,
            name,
            "is a class whose fields nobody checks or saves",
            "decorate it with @section (from megatron_rl.config import section)",
        )
    path = _check_class_variables(name, found)
    if found.stage == "rl" and not issubclass(found, ClippedConfig):
        raise UserError(
            FIELD,
            name,
            "has no settings of rollouts and updates, which a method of trainer.stage rl needs",
            "inherit from megatron_rl.config.GroupConfig or ClippedConfig, or set the class variable stage to sft",
        )
    if found.stage == "rl" and found.num_rows is MethodConfig.num_rows:
        raise UserError(FIELD, name, "does not say how many rows a step has", "give it a property num_rows")
    with plugins.named_by(name, path, field=FIELD):
        plugins.check(path, field=FIELD, what="a method")
    return found


def _check_class_variables(name: str, found: type[MethodConfig]) -> str:
    """Check what a settings class says of all its instances; return the path of its implementation."""
    for variable in {field.name for field in fields(found)} & {"implementation", "stage"}:
        raise UserError(
            FIELD,
            name,
            f"makes {variable} a field, which a config could change",
            f"annotate it as a class variable: {variable}: ClassVar[str] = ...",
        )
    path = getattr(found, "implementation", None)
    fix = 'give the settings a class variable: implementation: ClassVar[str] = "package.module:Class"'
    if path is None:
        raise UserError(FIELD, name, "does not say which class implements the method", fix)
    if not isinstance(path, str):
        rule = f"has an implementation that is {plugins.kind_of(path)}; it must be a text, package.module:Class"
        raise UserError(FIELD, name, rule, fix)
    if found.stage not in get_args(Stage):
        rule = f"has a stage that is {shortened(repr(found.stage))}; it must be rl or sft"
        raise UserError(FIELD, name, rule, "correct the class variable stage of the settings")
    return path


@contextmanager
def settings_code(name: str) -> Iterator[None]:
    """Run code of a method's settings; whatever comes out of a class from outside is an error of ``algorithm.name``.

    Raises:
        UserError: the code raised one, or anything else.
    """
    try:
        yield
    except UserError:
        raise
    except plugins.FROM_OUTSIDE as error:
        if name in METHODS:
            raise
        raise UserError(
            FIELD,
            name,
            f"cannot be checked ({described(error)})",
            "fix the settings class; it should raise megatron_rl.errors.UserError for settings that are wrong",
        ) from error


def check_sizes(settings: MethodConfig) -> None:
    """Check the numbers of rows that a settings class works out.

    Raises:
        UserError: one is not a whole number, or too small.
    """
    with settings_code(settings.name):
        sizes = {"num_rows": settings.num_rows, "num_stored_rows_per_update": settings.num_stored_rows_per_update}
    if settings.stage == "sft" and sizes["num_rows"] is None:
        del sizes["num_rows"]
    for what, size in sizes.items():
        least = 1 if what == "num_rows" else 0
        if type(size) is not int or size < least:
            rule = f"has a {what} that is {shortened(repr(size))}; it must be a whole number, {least} or more"
            raise UserError(
                FIELD, settings.name, rule, f"fix {what} of the settings class, or the settings it comes from"
            )


def check_can_be_saved(settings: MethodConfig) -> None:
    """Check that the settings can be written into the run's config.

    Raises:
        UserError: a field holds something that YAML cannot.
    """
    with settings_code(settings.name):
        values = asdict(settings)
    if _why_not_saved(values) is None:
        return
    for key, value in values.items():
        if (error := _why_not_saved({key: value})) is not None:
            rule = f"is {plugins.kind_of(value)} that a YAML file cannot hold ({str(error).splitlines()[0]})"
            fix = "give the field a type of numbers, texts, lists, dicts or sections"
            raise UserError(f"algorithm.{key}", value, rule, fix) from None


def _why_not_saved(values: dict[str, Any]) -> Exception | None:
    try:
        OmegaConf.to_yaml(OmegaConf.create(values))
    except (OmegaConfBaseException, YAMLError) as error:
        return error
    return None


def names_of_stage(stage: Stage) -> list[str]:
    """Return our methods that a loop can run."""
    return [name for name, settings in METHODS.items() if settings.stage == stage]
