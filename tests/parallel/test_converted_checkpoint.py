"""What a conversion writes, loaded by Megatron's own reader: strictly, under any layout, bit for bit what the HF files hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.convert.offline.convert import export_hf, import_hf
from tests.forked import run_ranks
from tests.policy_case import build_policy, tiny_config
from tests.tiny_models import make_tiny_model

LAYOUTS = [{"tp": 2, "sp": True}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}]
MODELS = [
    ("qwen3", True),
    ("llama", False),
    ("qwen2", False),
    ("qwen3_moe", False),
    ("mixtral", False),
    ("deepseek_v3", False),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        (family, tied): make_tiny_model(root / family, family, tied=tied, seed=3, num_hidden_layers=4)
        for family, tied in MODELS
    }  # fmt: skip


def load_strictly(model: Path, directory: Path, layout: dict, strict: str) -> dict[str, Tensor]:
    """Every HF tensor of a model that starts without a number and is filled from the directory."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from megatron_rl.convert.architecture.shape import read_shape
    from megatron_rl.model import specs
    from megatron_rl.model.build import build_chunks, build_groups_of
    from megatron_rl.model.torch_dist import load_torch_dist
    from megatron_rl.model.weights import iterate_hf_tensors

    if "sp" not in layout:  # Megatron's own; ours has no object of state for its whole projections
        specs.LatentAttention = MLASelfAttention
    config, shape = tiny_config(model, **layout), read_shape(model)
    groups = build_groups_of(config, torch.device("cpu"))
    chunks = build_chunks(config, shape, groups)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    load_torch_dist(chunks, groups, directory, strict=strict)
    return dict(iterate_hf_tensors(chunks, shape, groups))


def assert_loads(model: Path, directory: Path, layout: dict, strict: str) -> None:
    true = load_file(model / "model.safetensors")
    num_ranks = layout.get("tp", 1) * layout.get("pp", 1)
    for found in run_ranks(load_strictly, num_ranks, model, directory, layout, strict):
        assert found.keys() == true.keys()
        assert all(torch.equal(found[name], true[name]) for name in true), layout


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_loads_with_nothing_missing_and_nothing_left_over(case: tuple[str, bool], models: dict, tmp_path: Path) -> None:
    import_hf(models[case], tmp_path / "local", layer_spec="local")
    import_hf(models[case], tmp_path / "both")
    is_latent = case[0] == "deepseek_v3"
    for layout in (
        LAYOUTS if case == ("qwen3", True) else LAYOUTS[:2] if case[0] in ("llama", "deepseek_v3") else LAYOUTS[:1]
    ):
        strict = "raise_unexpected" if is_latent and "sp" in layout else "raise_all"
        assert_loads(models[case], tmp_path / "local", layout, strict)
    assert_loads(models[case], tmp_path / "both", {"pp": 2}, "raise_unexpected")


def save_step(model: Path, layout: dict, directory: Path) -> None:
    """A step of the trainer: weights as loaded, optimizer state beside them."""
    from megatron_rl.model.checkpoint import Checkpoints

    policy = build_policy(tiny_config(model, **layout))
    Checkpoints(directory, keep_last=1, groups=policy.groups, say=print).save(1, policy.trainable, {"step": 1})


def save_apart(model: Path, layout: dict, directory: Path) -> None:
    """As Megatron stores layers, experts, gate and up when it is asked for one tensor a shard."""
    from megatron.core import dist_checkpointing

    policy = build_policy(tiny_config(model, **layout))
    metadata = {"dp_cp_group": policy.groups.dp_cp_group, "singleton_local_shards": True}
    if policy.groups.rank == 0:
        directory.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save({"model": policy.chunks[0].sharded_state_dict(metadata=metadata)}, str(directory))


@pytest.mark.parametrize(
    ("case", "layout", "save"),
    [
        (("qwen3", True), {"tp": 2, "pp": 2}, save_step),
        (("deepseek_v3", False), {"pp": 2}, save_step),
        (("qwen3_moe", False), {"tp": 2, "sp": True}, save_apart),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_megatron_writes_is_exported(
    case: tuple[str, bool], layout: dict, save: Callable[..., None], models: dict, tmp_path: Path
) -> None:
    """Cut over tensor and pipeline ranks, with padded rows of the vocabulary, and the optimizer's tensors left out."""
    run_ranks(save, layout.get("tp", 1) * layout.get("pp", 1), models[case], layout, tmp_path / "saved")
    step = tmp_path / "saved" / "step_00000001"
    export_hf(step if step.exists() else tmp_path / "saved", tmp_path / "out", config_from=models[case])
    true, found = (load_file(folder / "model.safetensors") for folder in (models[case], tmp_path / "out"))
    assert found.keys() == true.keys()
    assert all(torch.equal(found[name], true[name]) for name in true)
