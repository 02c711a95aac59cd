"""The written checkpoint is complete and readable, or not there."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_rl.convert.architecture.shape import ModelShape, read_shape
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.convert.hf.writer import HFWriter
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "in", "qwen3", tied=False, seed=0, tokenizer=True)


@pytest.fixture
def shape(source: Path) -> ModelShape:
    return read_shape(source)


def write_all(writer: HFWriter, source: Path, *, backwards: bool = False) -> None:
    for name, tensor in sorted(load_file(source / "model.safetensors").items(), reverse=backwards):
        writer.add(name, tensor)


def test_files_that_cannot_be_made_are_a_user_error(source: Path, shape: ModelShape, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        HFWriter(tmp_path / "file/out", shape, source=source)


def test_a_disk_that_fills_up_on_creation_is_a_user_error(
    source: Path, shape: ModelShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        HFWriter(tmp_path / "out", shape, source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("max_shard_bytes", [2**30, 100_000, 1])
def test_transformers_loads_what_is_written(
    max_shard_bytes: int, source: Path, shape: ModelShape, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "new" / "out"
    with HFWriter(out, shape, source=source, max_shard_bytes=max_shard_bytes) as writer:
        write_all(writer, source, backwards=True)
    expected = load_file(source / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.float32
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert AutoTokenizer.from_pretrained(out)("a b").input_ids == AutoTokenizer.from_pretrained(source)("a b").input_ids
    files = sorted(out.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # the data is aligned
            assert len(list(handle.keys())) == 1 or file.stat().st_size <= max_shard_bytes + 10_000
    assert HFReader(out).names == set(expected)
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and not (out / "model.safetensors.index.json").exists()
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert read_shape(out) == shape
    assert (out / "generation_config.json").read_text() == (source / "generation_config.json").read_text()


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_dtype_is_converted_and_stated(keys: tuple[str, ...], source: Path, shape: ModelShape, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "float32")))
    with HFWriter(tmp_path / "out", shape, source=source, dtype="bfloat16") as writer:
        write_all(writer, source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = {key: written[key] for key in written if key.endswith("dtype")}
    assert stated == dict.fromkeys(keys or ("torch_dtype",), "bfloat16")
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_tensor_may_change_after_add(source: Path, shape: ModelShape, tmp_path: Path) -> None:
    with HFWriter(tmp_path / "out", shape, source=source) as writer:
        for name, tensor in load_file(source / "model.safetensors").items():
            writer.add(name, tensor)
            tensor.zero_()
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_transposed_view_is_written_in_its_own_order(source: Path, shape: ModelShape, tmp_path: Path) -> None:
    with HFWriter(tmp_path / "out", shape, source=source) as writer:
        for name, tensor in load_file(source / "model.safetensors").items():
            writer.add(name, tensor.T.contiguous().T if tensor.ndim == 2 else tensor)
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "in")


def test_nothing_appears_before_the_end(source: Path, shape: ModelShape, tmp_path: Path) -> None:
    with HFWriter(tmp_path / "out", shape, source=source) as writer:
        write_all(writer, source)
        assert not (tmp_path / "out").exists()
    assert left_over(tmp_path) == ["out"]


def test_an_error_leaves_nothing(source: Path, shape: ModelShape, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), HFWriter(tmp_path / "out", shape, source=source) as writer:
        write_all(writer, source)
        _ = 1 / 0
    assert left_over(tmp_path) == []


def test_a_missing_tensor_leaves_nothing(source: Path, shape: ModelShape, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"1 tensors were not written, for example model\.norm\.weight"),
        HFWriter(tmp_path / "out", shape, source=source) as writer,
    ):
        for name, tensor in load_file(source / "model.safetensors").items():
            if name != "model.norm.weight":
                writer.add(name, tensor)
    assert left_over(tmp_path) == []


def test_remains_of_a_killed_export_are_replaced(source: Path, shape: ModelShape, tmp_path: Path) -> None:
    HFWriter(tmp_path / "out", shape, source=source)  # killed: neither finished nor aborted
    assert left_over(tmp_path) == [".out.partial"]
    (tmp_path / ".out.partial" / "stale.safetensors").write_text("x")
    with HFWriter(tmp_path / "out", shape, source=source) as writer:
        write_all(writer, source)
    assert left_over(tmp_path) == ["out"]
    assert not (tmp_path / "out" / "stale.safetensors").exists()


@pytest.mark.parametrize(("name", "size", "message"), [
    ("model.norm.weight", (64,), "already written"), ("x", (64,), "not in this model"),
    ("lm_head.weight", (130, 64), r"\(131, 64\)"),
])  # fmt: skip
def test_wrong_tensor(
    name: str, size: tuple[int, ...], message: str, source: Path, shape: ModelShape, tmp_path: Path
) -> None:
    writer = HFWriter(tmp_path / "out", shape, source=source)
    writer.add("model.norm.weight", torch.ones(64))
    with pytest.raises(ValueError, match=message):
        writer.add(name, torch.ones(size))
    writer.abort()


def test_non_empty_target_is_refused_and_kept(source: Path, shape: ModelShape, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with HFWriter(tmp_path / "out", shape, source=source) as writer:  # an empty one is fine
        write_all(writer, source)
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="not an empty directory"):
        HFWriter(tmp_path / "out", shape, source=source)
    assert sorted((tmp_path / "out").iterdir()) == before


def test_target_that_is_a_file(source: Path, shape: ModelShape, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="not an empty directory"):
        HFWriter(tmp_path / "out", shape, source=source)


def test_source_without_config(shape: ModelShape, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json: is missing"):
        HFWriter(tmp_path / "out", shape, source=tmp_path / "empty")


def test_full_disk_is_noticed_first(
    source: Path, shape: ModelShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="MiB free"):
        HFWriter(tmp_path / "out", shape, source=source)
    assert left_over(tmp_path) == []
