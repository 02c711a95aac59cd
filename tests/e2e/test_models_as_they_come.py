"""A model by its name on the hub, in torch's files, whose tokenizer has no pad token: the same run as from a plain folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.e2e.conftest import Case

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot_of(model: Path, cache: Path) -> Path:
    """Put the model into a cache of the hub as ``org/name``, in two ``.bin`` files, without a pad token."""
    folder = cache / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors, places = load_file(model / "model.safetensors"), {}
    for number in range(2):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save(part := {name: tensors[name] for name in sorted(tensors)[number::2]}, snapshot / file)
        places |= dict.fromkeys(part, file)
    (snapshot / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for file in ("tokenizer_config.json", "config.json"):
        fields = json.loads((snapshot / file).read_text())
        fields.pop("pad_token", None)
        (snapshot / file).write_text(
            json.dumps({name: value for name, value in fields.items() if name != "pad_token_id"})
        )
    return snapshot


def test_a_model_of_the_hub_in_torch_files_without_pad_token_trains_alike(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = snapshot_of(case.model, tmp_path / "cache")
    assert AutoTokenizer.from_pretrained(case.model).pad_token_id is not None
    assert AutoTokenizer.from_pretrained(snapshot).pad_token_id is None

    named = replace(case, model=Path("org/name"))
    assert case.run("exp_manager.name=plain", "trainer.max_steps=1") == [0]
    assert named.run("exp_manager.name=named", "trainer.max_steps=1", "exp_manager.export_hf=true") == [0]
    assert named.rows("named") == case.rows("plain")
    assert "model_path: org/name" in (case.root / "named/config.yaml").read_text()
    exported = case.root / "named/hf"
    assert load_file(exported / "model.safetensors").keys() == load_file(case.model / "model.safetensors").keys()
    assert not list(exported.glob("*.bin*"))
    assert named.run("exp_manager.name=named", "trainer.max_steps=1", "exp_manager.export_hf=true") == [
        0
    ]  # nothing to do
