"""YAML in, checked frozen dataclasses out, before torch is imported.

``load_config(path, overrides)`` merges ``defaults:``, dotted overrides and interpolation (load.py), checks every value and
every pair of values (schema.py, algorithms.py), and checks the names of pass-through fields against the upstream sources
(upstream.py). Nothing in this package imports torch.
"""

from megatron_rl.config.algorithms import (
    AlgorithmConfig,
    DPHRLConfig,
    GroupConfig,
    GRPOConfig,
    KLConfig,
    OverlongConfig,
    ReplayConfig,
    RLEPConfig,
    SFTConfig,
)
from megatron_rl.config.files import check_files, read_model_shape
from megatron_rl.config.load import load_config, save_resolved
from megatron_rl.config.schema import Config, PolicyConfig

__all__ = [
    "AlgorithmConfig",
    "Config",
    "DPHRLConfig",
    "GRPOConfig",
    "GroupConfig",
    "KLConfig",
    "OverlongConfig",
    "PolicyConfig",
    "RLEPConfig",
    "ReplayConfig",
    "SFTConfig",
    "check_files",
    "load_config",
    "read_model_shape",
    "save_resolved",
]
