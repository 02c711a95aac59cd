"""Weights in torch's ``.bin`` files are read as those in safetensors are, in slices, and nothing in them is run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.convert.architecture.weight_files import check_weight_files
from megatron_rl.convert.hf.load import check_coverage, load_parameter
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.convert.offline.convert import export_hf, import_hf
from megatron_rl.convert.offline.verify import verify
from megatron_rl.data.origin import model_digest
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("safe"), "llama", tied=False, seed=0, dtype="bfloat16")


def as_torch(safe: Path, target: Path, *, num_files: int = 1, **options: Any) -> Path:
    """Write the same model as ``.bin`` files."""
    shutil.copytree(safe, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(safe / "model.safetensors")
    if num_files == 1:
        torch.save(tensors, target / "pytorch_model.bin", **options)
        return target
    places = {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        part = {name: tensors[name] for name in sorted(tensors)[number::num_files]}
        torch.save(part, target / file)
        places |= dict.fromkeys(part, file)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


@pytest.mark.parametrize("num_files", [1, 3])
def test_torch_files_read_like_safetensors(safe: Path, tmp_path: Path, num_files: int) -> None:
    directory = as_torch(safe, tmp_path / "bin", num_files=num_files)
    assert len(check_weight_files(directory).files) == num_files
    shape, reader, true = read_shape(directory), HFReader(directory), HFReader(safe)
    check_coverage(shape, reader, tp_size=2)
    assert reader.names == true.names and all(torch.equal(reader.read(name), true.read(name)) for name in true.names)
    for name in ("decoder.layers.1.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.linear_fc1.weight"):
        rank = [torch.empty(0)] * 2
        for place, source in enumerate((reader, true)):
            rows = 64 if "qkv" in name else 96
            rank[place] = torch.empty(rows, 64, dtype=torch.float32)
            load_parameter(name, source, shape, 1, 2, out=rank[place])
        assert torch.equal(*rank) and rank[0].std() > 0
    assert model_digest(directory) == model_digest(safe)


def test_conversion_reads_torch_files_and_keeps_their_types(safe: Path, tmp_path: Path) -> None:
    directory = as_torch(safe, tmp_path / "bin", num_files=2)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))  # the files have another type
    import_hf(directory, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    written, true = load_file(tmp_path / "back/model.safetensors"), load_file(safe / "model.safetensors")
    assert written.keys() == true.keys()
    assert all(torch.equal(written[name], true[name]) and written[name].dtype == torch.bfloat16 for name in true)
    assert verify(str(directory), str(tmp_path / "megatron")) == []


def test_safetensors_come_before_torch_files(safe: Path, tmp_path: Path) -> None:
    directory = as_torch(safe, tmp_path / "bin")
    (directory / "pytorch_model.bin").write_bytes(b"another model")
    shutil.copy(safe / "model.safetensors", directory)
    assert [path.name for path in HFReader(directory).files] == ["model.safetensors"]


class Evil:
    """Runs something where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_nothing_in_a_torch_file_is_run(safe: Path, tmp_path: Path) -> None:
    directory = as_torch(safe, tmp_path / "bin")
    torch.save({"model.norm.weight": Evil(tmp_path / "mark")}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: is not a complete file of tensors"):
        HFReader(directory)
    assert not (tmp_path / "mark").exists()


def lose(directory: Path) -> None:
    (directory / "pytorch_model-00002-of-00003.bin").unlink()


def cut(directory: Path) -> None:
    path = directory / "pytorch_model-00002-of-00003.bin"
    path.write_bytes(path.read_bytes()[:-200])


def point(directory: Path) -> None:
    (directory / "pytorch_model-00002-of-00003.bin").write_text("version https://git-lfs.github.com/spec/v1\noid 0\n")


def old(directory: Path) -> None:
    tensors: dict[str, Tensor] = {"a": torch.ones(2)}
    torch.save(tensors, directory / "pytorch_model-00002-of-00003.bin", _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose, "00002-of-00003.bin: is named in pytorch_model.bin.index.json but missing"),
        (cut, "00002-of-00003.bin: is not a complete file of torch"),
        (point, "00002-of-00003.bin: is a git-lfs pointer"),
        (old, "before 1.6, which cannot be read in parts"),
    ],
)
def test_a_wrong_file_is_named_before_torch_is_asked(safe: Path, tmp_path: Path, damage: Any, words: str) -> None:
    directory = as_torch(safe, tmp_path / "bin", num_files=3)
    damage(directory)
    with pytest.raises(UserError, match=words):
        check_weight_files(directory)


def test_a_gguf_file_is_refused_with_the_tool_that_turns_it(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2.Q4_1.gguf").touch()
    with pytest.raises(UserError, match=r"tools/gguf_to_hf\.py SmolLM2\.Q4_1\.gguf FOLDER"):
        check_weight_files(tmp_path)
