"""Damaged, incomplete and contradictory checkpoints are refused, by name, before anything is filled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.convert.hf import load
from megatron_rl.convert.hf.load import check_coverage, load_parameter
from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model

DOWN = "model.layers.1.mlp.down_proj.weight"


def make(directory: Path, *, tied: bool = False) -> Path:
    return make_tiny_model(directory, "qwen2", tied=tied, seed=0)


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def split(directory: Path) -> None:
    """Two files and an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index_of(directory: Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_coverage(read_shape(directory), HFReader(directory))
    assert str(directory) in caught.value.field
    return str(caught.value)


def test_sharded_checkpoint_reads_like_one_file(tmp_path: Path) -> None:
    whole = load_file(make(tmp_path) / "model.safetensors")
    split(tmp_path)
    reader = HFReader(tmp_path)
    check_coverage(read_shape(tmp_path), reader, tp_size=4)
    assert reader.names == set(whole)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in whole.items())


def test_no_checkpoint(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "has neither" in refused(tmp_path)


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.01, 0.0])
def test_truncated_file(keep: float, tmp_path: Path) -> None:
    path = make(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert "not a complete safetensors file" in refused(tmp_path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (make(tmp_path) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git-lfs" in refused(tmp_path)


def test_missing_file_of_the_index(tmp_path: Path) -> None:
    make(tmp_path)
    split(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: is named in" in refused(tmp_path)


def test_truncated_second_file(tmp_path: Path) -> None:
    make(tmp_path)
    split(tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "00002-of-00002.safetensors: is not a complete" in refused(tmp_path)


def test_index_that_places_a_tensor_in_the_wrong_file(tmp_path: Path) -> None:
    make(tmp_path)
    split(tmp_path)
    index = index_of(tmp_path)
    write_index(tmp_path, index | {DOWN: next(file for file in index.values() if file != index[DOWN])})
    assert f"lacks {DOWN}" in refused(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}',
                                  '{"weight_map": {"a": 1}}'])  # fmt: skip
def test_invalid_index(text: str, tmp_path: Path) -> None:
    (make(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "index.json" in refused(tmp_path)


def test_single_file_beside_an_index(tmp_path: Path) -> None:
    make(tmp_path)
    write_index(tmp_path, {"a": "model.safetensors"})
    assert "has both" in refused(tmp_path)


def test_tensor_stored_twice(tmp_path: Path) -> None:
    make(tmp_path)
    split(tmp_path)
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    tensors = load_file(tmp_path / second)
    save_file(tensors | {"lm_head.weight": torch.zeros(1), "model.norm.weight": torch.zeros(1)}, tmp_path / second)
    assert f"is also in {first}" in refused(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    edit(make(tmp_path), lambda tensors: tensors.pop(DOWN))
    assert f"{DOWN}: is required" in refused(tmp_path)


def test_untied_config_without_output_layer(tmp_path: Path) -> None:
    edit(make(tmp_path), lambda tensors: tensors.pop("lm_head.weight"))
    assert "check tie_word_embeddings" in refused(tmp_path)


def test_shape_at_odds_with_config(tmp_path: Path) -> None:
    edit(make(tmp_path), lambda tensors: tensors.update({DOWN: torch.zeros(64, 95)}))
    message = refused(tmp_path)
    assert DOWN in message and "(64, 95)" in message and "(64, 96)" in message


def test_quantized_tensor(tmp_path: Path) -> None:
    edit(make(tmp_path), lambda tensors: tensors.update({DOWN: torch.zeros(64, 96, dtype=torch.int8)}))
    assert "'I8'" in refused(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.bias"])
def test_tensor_that_nothing_uses(name: str, tmp_path: Path) -> None:
    edit(make(tmp_path), lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert name in refused(tmp_path)


def test_stored_inverse_frequencies_are_ignored(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "rotary_emb.inv_freq": torch.zeros(4)}
    edit(make(tmp_path), lambda tensors: tensors.update(extra))
    check_coverage(read_shape(tmp_path), HFReader(tmp_path))


def test_tied_model_may_store_an_equal_output_layer(tmp_path: Path) -> None:
    make(tmp_path, tied=True)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    check_coverage(read_shape(tmp_path), HFReader(tmp_path))


@pytest.mark.parametrize("row", [0, 130])
def test_tied_model_with_another_output_layer(row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, tied=True)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][row, 5] += 1

    edit(tmp_path, change)
    monkeypatch.setattr(load, "_BLOCK_ELEMENTS", 50 * 64)  # three blocks
    assert "differs from model.embed_tokens.weight" in refused(tmp_path)


@pytest.mark.parametrize("damage", [lambda t: t.pop(DOWN), lambda t: t.update({DOWN: torch.zeros(63, 96)})])
def test_load_parameter_checks_before_it_fills(damage: Callable[[dict[str, Tensor]], object], tmp_path: Path) -> None:
    edit(make(tmp_path), damage)
    out = torch.full((64, 48), 7.0)
    with pytest.raises(UserError, match=DOWN):
        load_parameter("decoder.layers.1.mlp.linear_fc2.weight", HFReader(tmp_path), read_shape(tmp_path), 0, 2, out)
    assert (out == 7).all()


def test_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    name, out = "embedding.word_embeddings.weight", torch.full((66, 64), 7.0)
    with pytest.raises(UserError, match=r"embedding.word_embeddings.weight = \(66, 64\).*\(128, 64\)"):
        load_parameter(name, HFReader(tmp_path), read_shape(tmp_path), 0, 2, out)
    assert (out == 7).all()
    load_parameter(name, HFReader(tmp_path), read_shape(tmp_path), 0, 2, out, vocab_multiple=1)
