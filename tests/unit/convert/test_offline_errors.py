"""What is wrong with the input is said in one sentence, before the first byte is written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from megatron_rl.commands.cli import app
from megatron_rl.convert.offline.convert import export_hf, import_hf
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("hf"), "qwen3", tied=False, seed=0)


@pytest.fixture(scope="module")
def megatron(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "megatron"
    import_hf(model, directory)
    return directory


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def edit_metadata(directory: Path, edit: Callable[[dict], object]) -> None:
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata.state_dict_metadata)
    path.write_bytes(pickle.dumps(metadata))


HF_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "wrong family": (lambda d: edit_config(d, model_type="gpt2"), "model_type.*must be one of"),
    "other family": (lambda d: edit_config(d, model_type="llama", architectures=None), "q_norm|nothing in a llama"),
    "missing": (lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")), r"model\.norm\.weight: is required"),
    "extra": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.more": t["model.norm.weight"].clone()})), "model.more: nothing",
    ),
    "shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:8].clone()})),
        r"model\.norm\.weight = \(8,\): config.json gives the shape \(64,\)",
    ),
    "type": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].long()})), "must be F32",
    ),
    "mixed types": (
        lambda d: edit_tensors(
            d, lambda t: t.update({k: v.bfloat16() for k, v in t.items() if "0.self_attn.k_proj" in k})
        ),
        "becomes one tensor with .*q_proj.* --dtype",
    ),
    "cut short": (lambda d: cut(d / "model.safetensors"), "is not a complete safetensors file"),
    "config of another size": (lambda d: edit_config(d, num_hidden_layers=3, layer_types=None), r"layers\.2\..* is required"),
    "no config": (lambda d: (d / "config.json").unlink(), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", HF_CASES)
def test_bad_hf_checkpoint(case: str, model: Path, tmp_path: Path) -> None:
    damage, message = HF_CASES[case]
    shutil.copytree(model, tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        import_hf(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


MEGATRON_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda d: cut(d / "__0_0.distcp"), "it is cut short"),
    "file missing": (lambda d: (d / "__0_0.distcp").unlink(), "is missing, but holds a part of"),
    "no metadata": (lambda d: (d / ".metadata").unlink(), "is no Megatron checkpoint"),
    "damaged metadata": (lambda d: cut(d / ".metadata"), "cannot be read"),
    "tensor missing": (
        lambda d: edit_metadata(d, lambda t: t.pop("decoder.final_layernorm.weight")), "final_layernorm.weight: is required",
    ),
    "tensor left over": (
        lambda d: edit_config(d / "hf", tie_word_embeddings=True), r"output_layer\.weight: nothing in this qwen3 model",
    ),
    "config of another size": (lambda d: edit_config(d / "hf", intermediate_size=80), r"linear_fc1\.weight = .*shape"),
    "other family": (
        lambda d: edit_config(d / "hf", model_type="qwen2", architectures=None), r"linear_qkv\.bias: is required",
    ),
    "chunk missing": (
        lambda d: edit_metadata(d, lambda t: t["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()), "exactly once",
    ),
    "chunk twice": (
        lambda d: edit_metadata(
            d, lambda t: (c := t["decoder.layers.mlp.linear_fc2.weight"].chunks).__setitem__(1, c[0])
        ),
        "exactly once",
    ),
    "no config": (lambda d: shutil.rmtree(d / "hf"), "--hf"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEGATRON_CASES)
def test_bad_megatron_checkpoint(case: str, megatron: Path, tmp_path: Path) -> None:
    damage, message = MEGATRON_CASES[case]
    shutil.copytree(megatron, tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        export_hf(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_target_that_is_taken(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    import_hf(model, tmp_path / "out")  # an empty one is fine
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="not an empty directory"):
        import_hf(model, tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_disk_without_room(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=2**20))
    with pytest.raises(UserError, match=r"1\.0 MiB free, the checkpoint needs \d+\.\d MiB"):
        import_hf(model, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_command_line(model: Path, megatron: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["convert", "import", str(model), str(tmp_path / "m"), "--layer-spec", "te"]).exit_code == 0
    assert run(app, ["convert", "export", str(tmp_path / "m"), str(tmp_path / "hf")]).exit_code == 0
    assert "every tensor" in run(app, ["convert", "verify", str(tmp_path / "m"), str(megatron)]).output
    edit_tensors(tmp_path / "hf", lambda t: t["model.norm.weight"].add_(1.0))
    result = run(app, ["convert", "verify", str(tmp_path / "hf")])
    assert result.exit_code == 1 and result.output.startswith("model.norm.weight: digest ")
    assert isinstance(run(app, ["convert", "verify", str(model)]).exception, UserError)  # it has no manifest
