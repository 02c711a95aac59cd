"""The machinery around the patches: explicit, once, loud."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import types

import pytest
import torch

from megatron_rl import patches
from megatron_rl.errors import UserError
from megatron_rl.patches.megatron_core.upstream import replace, require, restore


@pytest.mark.slow
def test_import_patches_nothing() -> None:
    program = (
        "import sys, torch; before = torch.compile, torch.Tensor.cuda\n"
        "import megatron_rl.patches.megatron_core.device, megatron_rl.patches.megatron_core.rng\n"
        "assert (torch.compile, torch.Tensor.cuda) == before\n"
        "assert not any(name.split('.')[0] == 'megatron' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_second_apply_changes_nothing() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    constructor = WrappedTorchNorm.__new__
    assert patches.apply() == patches.apply()
    assert "megatron_core.norm" in patches.apply()
    assert WrappedTorchNorm.__new__ is constructor


def test_each_patch_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from megatron_rl.patches import megatron_core

    monkeypatch.setattr(patches, "_applied", None)
    monkeypatch.setattr(patches, "_device_type", None)
    monkeypatch.setattr(megatron_core, "apply_cpu", lambda: ["rope"])
    monkeypatch.setattr(megatron_core, "apply_everywhere", lambda: ["checkpoint"])
    with caplog.at_level(logging.INFO, logger="megatron_rl.patches"):
        assert patches.apply() == ["pytorch.bound_store", "megatron_core.rope", "megatron_core.checkpoint"]
    assert [record.getMessage() for record in caplog.records] == [
        "applied patch pytorch.bound_store",
        "applied patch megatron_core.rope",
        "applied patch megatron_core.checkpoint",
    ]


def test_what_is_about_cpus_is_not_patched_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local layers, which a GPU may be asked to take, and torch's Adam need their patches there, too."""
    monkeypatch.setattr(patches, "_applied", None)
    monkeypatch.setattr(patches, "_device_type", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    topics = ("norm", "moe", "latent", "optimizer", "checkpoint", "checkpoint_errors")
    assert patches.apply() == ["pytorch.bound_store", *(f"megatron_core.{topic}" for topic in topics)]


@pytest.mark.slow
def test_local_layers_run_with_the_patches_of_a_gpu() -> None:
    """In a process of its own: these alone, nothing of what CPUs need."""
    program = (
        "from types import SimpleNamespace\n"
        "from megatron_rl import patches\n"
        "patches.apply('cuda')\n"
        "from megatron.core.transformer import multi_latent_attention\n"
        "from megatron.core.transformer.torch_norm import WrappedTorchNorm\n"
        "config = SimpleNamespace(normalization='RMSNorm', sequence_parallel=True, persist_layer_norm=True,\n"
        "    layernorm_zero_centered_gamma=False, memory_efficient_layer_norm=False)\n"
        "assert WrappedTorchNorm(config, 8).weight.sequence_parallel\n"
        "assert not multi_latent_attention.HAVE_TE\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_cpu_run_on_a_machine_with_cuda_is_patched_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rl.patches import megatron_core

    monkeypatch.setattr(patches, "_applied", None)
    monkeypatch.setattr(patches, "_device_type", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(megatron_core, "apply_cpu", lambda: ["rope"])
    assert "megatron_core.rope" in patches.apply("cpu")
    assert "megatron_core.rope" in patches.apply()  # whoever does not say gets what there is
    with pytest.raises(RuntimeError, match="patched for cpu and cannot serve cuda"):
        patches.apply("cuda")


@pytest.mark.parametrize("package", ["psutil", "tqdm"])
def test_missing_package_is_named_before_anything_hangs(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(patches, "_applied", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=f"{package}: must be installed"):
        patches.apply()


def test_what_upstream_has_removed_is_named() -> None:
    upstream = types.ModuleType("megatron.core.somewhere")
    with pytest.raises(RuntimeError, match=r"megatron\.core\.somewhere has no fork in megatron-core \d"):
        require(upstream, "fork")


def test_replace_wraps_once_and_restore_undoes_it() -> None:
    class Upstream:
        @staticmethod
        def answer() -> int:
            return 1

    for _ in range(2):
        replace(Upstream, "answer", lambda original: lambda: original() + 1)
    assert Upstream().answer() == 2
    restore(Upstream, "answer")
    assert Upstream().answer() == 1
