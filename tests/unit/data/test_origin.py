"""Digests of tokenizers and weights: equal where nothing differs but the files, different where an id or a bit does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rl.data.origin import (
    digest_of_fingerprints,
    model_digest,
    random_model_digest,
    tokenizer_digest,
    weight_fingerprints,
)
from megatron_rl.errors import UserError
from megatron_rl.tasks.word_tokenizer import ModelSize, save_model
from tests.tiny_models import make_tiny_model

# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("words")
    save_model(directory, ModelSize(hidden_size=16, num_layers=1))
    return directory


def edited(directory: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> str:
    """Digest of the tokenizer after a change to its tokenizer.json."""
    AutoTokenizer.from_pretrained(directory).save_pretrained(target)
    fields = json.loads((target / "tokenizer.json").read_text())
    edit(fields)
    (target / "tokenizer.json").write_text(json.dumps(fields))
    return tokenizer_digest(AutoTokenizer.from_pretrained(target))


def test_a_saved_tokenizer_has_the_digest_of_the_original(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    digest = tokenizer_digest(tokenizer)
    assert len(digest) == 16 and int(digest, 16) >= 0
    tokenizer("Ana has 7", padding="max_length", truncation=True, max_length=8)  # leaves its mark in the backend
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "again")) == digest


def swap_two_ids(fields: dict[str, Any]) -> None:
    words = fields["model"]["vocab"]
    words["+"], words["-"] = words["-"], words["+"]


def split_otherwise(fields: dict[str, Any]) -> None:
    fields["pre_tokenizer"]["pretokenizers"][1]["individual_digits"] = False


def lower_case(fields: dict[str, Any]) -> None:
    fields["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("edit", [swap_two_ids, split_otherwise, lower_case])
def test_a_tokenizer_that_gives_other_ids_has_another_digest(
    tokenizer_dir: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    digest = tokenizer_digest(AutoTokenizer.from_pretrained(tokenizer_dir))
    assert edited(tokenizer_dir, tmp_path / "same", lambda fields: None) == digest
    assert edited(tokenizer_dir, tmp_path / "other", edit) != digest


def test_added_tokens_and_the_end_token_count(tokenizer_dir: Path) -> None:
    def load() -> PreTrainedTokenizerFast:
        return AutoTokenizer.from_pretrained(tokenizer_dir)

    more, other_end = load(), load()
    more.add_tokens(["<tool>"])
    other_end.eos_token = "<pad>"
    assert len({tokenizer_digest(tokenizer) for tokenizer in (load(), more, other_end)}) == 3


# -------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tied=False, seed=0, dtype="bfloat16")


def rewritten(tensors: dict[str, Tensor], directory: Path, num_files: int) -> Path:
    """The same tensors, dealt out to files by another rule than transformers'."""
    directory.mkdir()
    places: dict[str, str] = {}
    for i in range(num_files):
        name = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" if num_files > 1 else "model.safetensors"
        part = {key: tensors[key].contiguous() for key in sorted(tensors, reverse=True)[i::num_files]}
        save_file(part, directory / name)
        places |= dict.fromkeys(part, name)
    if num_files > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def test_files_do_not_matter(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    digest = model_digest(model)
    assert len(digest) == 16
    assert model_digest(rewritten(tensors, tmp_path / "one", 1)) == digest
    assert model_digest(rewritten(tensors, tmp_path / "three", 3)) == digest


def flip_a_bit(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1


def swap_names(tensors: dict[str, Tensor]) -> None:
    k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
    tensors[k], tensors[v] = tensors[v], tensors[k]


def same_bits_of_another_type(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.float16)


def another_shape(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = tensors[name].reshape(-1, 2, tensors[name].shape[1])  # as rows and columns it is the same


def leave_one_out(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


@pytest.mark.parametrize(
    "edit", [flip_a_bit, swap_names, same_bits_of_another_type, another_shape, leave_one_out], ids=lambda f: f.__name__
)
def test_other_weights_have_another_digest(
    model: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None]
) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    assert model_digest(rewritten(tensors, tmp_path / "other", 2)) != model_digest(model)


def test_tensors_of_any_number_of_dimensions_are_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "scale": torch.tensor(0.5), "experts": torch.randn(3, 5, 7, generator=generator), "none": torch.zeros(0, 4),
        "fp8": torch.randn(4, 6, generator=generator).to(torch.float8_e4m3fn),
    }  # fmt: skip
    digests = {model_digest(rewritten(tensors, tmp_path / "original", 1))}
    for name, value in (
        ("scale", torch.tensor(-0.5)),
        ("experts", tensors["experts"].flip(0)),
        ("fp8", -tensors["fp8"].float()),
    ):
        other = tensors | {name: value.to(tensors[name].dtype)}
        digests.add(model_digest(rewritten(other, tmp_path / name, 1)))
    assert len(digests) == 4


@pytest.mark.parametrize("num_ranks", [2, 3, 50])
def test_ranks_share_the_work_and_agree(model: Path, num_ranks: int) -> None:
    shares = [weight_fingerprints(model, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert digest_of_fingerprints(shares) == digest_of_fingerprints(shares[::-1]) == model_digest(model)
    assert digest_of_fingerprints(shares[1:]) != model_digest(model)


def test_a_random_model_is_its_config_and_seed(tokenizer_dir: Path, tmp_path: Path) -> None:
    digest = random_model_digest(tokenizer_dir, 1)
    assert random_model_digest(tokenizer_dir, 1) == digest != random_model_digest(tokenizer_dir, 2)
    save_model(tmp_path / "wider", ModelSize(hidden_size=32, num_layers=1))
    assert random_model_digest(tmp_path / "wider", 1) != digest


def test_what_is_missing_is_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither model\.safetensors"):
        model_digest(tokenizer_dir)
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        random_model_digest(tmp_path, 1)
