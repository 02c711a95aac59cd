"""YAML in, checked frozen dataclasses out, before torch is imported.

``load_config(path, overrides)`` merges ``defaults:``, dotted overrides and interpolation (load.py), checks every value
(trainer.py, policy.py, rollout.py, data.py, methods/) and every pair of values (schema.py), and checks the names of
pass-through fields against the upstream sources (upstream.py). Nothing in this package imports torch.
"""

from megatron_rl.config.data import PresampleConfig
from megatron_rl.config.files import check_files, check_names, check_shape, read_model_shape
from megatron_rl.config.load import load_config
from megatron_rl.config.methods import MethodConfig
from megatron_rl.config.methods.base import OtherSections
from megatron_rl.config.methods.shared import ClippedConfig, GroupConfig
from megatron_rl.config.policy import PolicyConfig
from megatron_rl.config.schema import Config
from megatron_rl.config.secrets import save_resolved, shown, to_yaml
from megatron_rl.config.section import section
from megatron_rl.config.trainer import NumericsConfig

__all__ = [
    "ClippedConfig",
    "Config",
    "GroupConfig",
    "MethodConfig",
    "NumericsConfig",
    "OtherSections",
    "PolicyConfig",
    "PresampleConfig",
    "check_files",
    "check_names",
    "check_shape",
    "load_config",
    "read_model_shape",
    "save_resolved",
    "section",
    "shown",
    "to_yaml",
]
