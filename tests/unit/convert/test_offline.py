"""Conversion there and back: bit for bit, cast, resumed, verified."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.convert.architecture.shape import Family
from megatron_rl.convert.offline import distcp, partial
from megatron_rl.convert.offline.convert import export_hf, import_hf
from megatron_rl.convert.offline.manifest import read_manifest
from megatron_rl.convert.offline.reporter import Reporter
from megatron_rl.convert.offline.sources import MegatronSource
from megatron_rl.convert.offline.verify import verify
from megatron_rl.errors import UserError
from tests.forked import run_child
from tests.tiny_models import make_tiny_model


class Notes(Reporter):
    """Keeps what is said; calls a function after each piece."""

    def __init__(self, on_advance: Callable[[int], None] = lambda _count: None) -> None:
        self.lines: list[str] = []
        self.count, self._on_advance = 0, on_advance

    def advance(self, num_bytes: int) -> None:
        if num_bytes:
            self.count += 1
            self._on_advance(self.count)

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=True, seed=0, tokenizer=True)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files, many chunks, many blocks, as a large model has them."""
    monkeypatch.setattr(partial, "_PART_BYTES", 2**14)
    monkeypatch.setattr("megatron_rl.convert.offline.convert.MAX_CHUNK_BYTES", 2**12)


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_equal(found: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert found.keys() == true.keys()
    for name, tensor in true.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", get_args(Family))
def test_round_trip_is_bit_exact(family: Family, tied: bool, tmp_path: Path, small_parts: None) -> None:
    source = make_tiny_model(tmp_path / "in", family, tied=tied, seed=1, dtype="bfloat16")
    there = import_hf(source, tmp_path / "megatron")
    back = export_hf(tmp_path / "megatron", tmp_path / "out", max_shard_bytes=2**16)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 3 and len(list((tmp_path / "out").glob("*.saf*"))) > 2
    assert_equal(weights(tmp_path / "out"), weights(source))
    assert there.tensors == back.tensors == read_manifest(tmp_path / "megatron" / "digests.json")
    assert (
        verify(tmp_path / "megatron") == verify(tmp_path / "out", source) == verify(source, tmp_path / "megatron") == []
    )


def test_biases_come_back(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in", "llama", tied=False, seed=1, attention_bias=True, mlp_bias=True)
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    assert_equal(weights(tmp_path / "out"), weights(source))


def test_export_needs_nothing_but_the_megatron_directory(qwen3: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import_hf(qwen3, tmp_path / "a" / "megatron")
    shutil.move(tmp_path / "a" / "megatron", tmp_path / "moved")
    export_hf(tmp_path / "moved", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (qwen3 / "config.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("2 + 2")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters()


def test_cast_is_that_of_torch_and_is_verified_against_the_original(qwen3: Path, tmp_path: Path) -> None:
    import_hf(qwen3, tmp_path / "megatron", dtype="bfloat16")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    assert_equal(weights(tmp_path / "out"), {name: t.bfloat16() for name, t in weights(qwen3).items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify(tmp_path / "megatron", qwen3, dtype="bfloat16") == []
    assert "bfloat16, expected float32" in verify(tmp_path / "megatron", qwen3)[0]


def test_what_stays_float32_is_not_cast(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in", "deepseek_v3", tied=False, seed=1)
    found = import_hf(source, tmp_path / "megatron", dtype="bfloat16").tensors
    kinds = {name: fingerprint.dtype for name, fingerprint in found.items()}
    biases = {name for name in kinds if name.endswith("e_score_correction_bias")}
    assert biases and {name for name, kind in kinds.items() if kind == "float32"} == biases


def test_eight_bit_weights_are_made_whole(tmp_path: Path) -> None:
    """In the type of config.json, and an export says nothing of eight bits."""
    source = make_tiny_model(tmp_path / "in", "deepseek_v3", tied=False, seed=1, dtype="bfloat16")
    tensors, name = weights(source), "model.layers.1.mlp.experts.3.up_proj.weight"
    whole = tensors[name]
    tensors[name], tensors[name + "_scale_inv"] = whole.to(torch.float8_e4m3fn), torch.tensor([[0.5]])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "out")
    true = {key: t for key, t in tensors.items() if not key.endswith("_scale_inv")}
    assert_equal(weights(tmp_path / "out"), true | {name: (tensors[name].float() * 0.5).bfloat16()})
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_value_beyond_float16_is_refused(qwen3: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3, tmp_path / "in")
    tensors = weights(qwen3)
    tensors["model.norm.weight"][3] = 70000.0
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight, which is beyond 65504"):
        import_hf(tmp_path / "in", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_killed_conversion_goes_on_with_what_is_whole(
    direction: str, qwen3: Path, tmp_path: Path, small_parts: None
) -> None:
    import_hf(qwen3, tmp_path / "whole")
    convert, source = (import_hf, qwen3) if direction == "import" else (export_hf, tmp_path / "whole")
    target, limit = tmp_path / "out", 12

    def die(count: int) -> None:
        if count > limit:
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_child(lambda: convert(source, target, num_threads=2, reporter=Notes(die))) == -signal.SIGKILL
    assert not target.exists()
    journal = tmp_path / ".out.partial.journal"
    num_done = len(journal.read_text().splitlines()) - 1
    assert num_done > 1
    with journal.open("a") as file:
        file.write('{"part": 0, "dig')  # what a crash may leave
    notes, anew = Notes(), Notes()
    convert(source, tmp_path / "anew", reporter=anew)
    convert(source, target, reporter=notes)
    assert notes.count <= anew.count - num_done + 1  # the one: what was there already, told at once
    assert notes.lines[0] == f"going on with an earlier start: {num_done} parts are on disk already"
    assert verify(target, qwen3) == verify(target) == []
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "anew", "out"}


@pytest.mark.parametrize("change", ["option", "source"])
def test_other_work_starts_over(change: str, qwen3: Path, tmp_path: Path, small_parts: None) -> None:
    def fail(count: int) -> None:
        if count > 12:
            raise OSError(28, "No space left on device")

    shutil.copytree(qwen3, tmp_path / "in")
    with pytest.raises(UserError, match=r"No space left on device.*goes on where it stopped"):
        import_hf(tmp_path / "in", tmp_path / "out", reporter=Notes(fail))
    assert not (tmp_path / "out").exists()
    if change == "source":  # of equal size
        os.utime(tmp_path / "in" / "model.safetensors")
    notes, dtype = Notes(), "bfloat16" if change == "option" else "float32"
    import_hf(tmp_path / "in", tmp_path / "out", dtype=dtype if change == "option" else None, reporter=notes)
    assert notes.lines == ["an earlier start had other input or options, or lost files: starting over"]
    assert verify(tmp_path / "out", qwen3, dtype=dtype) == []


def test_two_conversions_to_one_target_do_not_mix(qwen3: Path, tmp_path: Path) -> None:
    def second(count: int) -> None:
        if count == 1:
            with pytest.raises(UserError, match="being written by another process"):
                import_hf(qwen3, tmp_path / "out")

    import_hf(qwen3, tmp_path / "out", num_threads=1, reporter=Notes(second))
    assert verify(tmp_path / "out", qwen3) == []


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_one_changed_bit_names_its_tensor(qwen3: Path, tmp_path: Path) -> None:
    import_hf(qwen3, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    chunk = distcp.Distcp(tmp_path / "megatron").tensors["decoder.layers.self_attention.linear_qkv.weight"].chunks[1]
    flip_byte(tmp_path / "megatron" / chunk.file, chunk.offset + 1000)  # layer 1, group 0: queries
    (line,) = verify(tmp_path / "megatron")
    assert line.startswith("model.layers.1.self_attn.q_proj.weight: digest ")
    assert verify(tmp_path / "megatron", tmp_path / "hf") == [line]
    flip_byte(tmp_path / "hf" / "model.safetensors", (tmp_path / "hf" / "model.safetensors").stat().st_size - 3)
    assert len(verify(tmp_path / "hf")) == 1


def test_torch_reads_every_tensor(qwen3: Path, tmp_path: Path, small_parts: None) -> None:
    """By its own planner and reader, not by ours."""
    from torch.distributed.checkpoint import FileSystemReader, load

    import_hf(qwen3, tmp_path / "megatron")
    metadata = FileSystemReader(tmp_path / "megatron").read_metadata().state_dict_metadata
    state = {
        key: torch.full(m.size, torch.nan, dtype=m.properties.dtype)
        for key, m in metadata.items()
        if hasattr(m, "size")
    }
    load(state, checkpoint_id=tmp_path / "megatron", no_dist=True)
    assert not any(tensor.isnan().any() for tensor in state.values())
    true = weights(qwen3)
    embedding = state["embedding.word_embeddings.weight"]
    assert torch.equal(embedding, true["model.embed_tokens.weight"]) and len(embedding) == 131  # padded by who loads
    gate, up = (true[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(state["decoder.layers.mlp.linear_fc1.weight"][1], torch.cat([gate, up]))
    norms = state["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
    assert torch.equal(norms[0], true["model.layers.0.post_attention_layernorm.weight"])


def test_nemo_directory_is_read(qwen3: Path, tmp_path: Path) -> None:
    """weights/ beside context/, and every name behind ``module.``."""
    import pickle

    import_hf(qwen3, tmp_path / "weights", layer_spec="te")
    (tmp_path / "context").mkdir()
    shutil.rmtree(tmp_path / "weights" / "hf")
    path = tmp_path / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata = {f"module.{k}": v for k, v in metadata.state_dict_metadata.items()}
    metadata.storage_data = {
        type(k)(f"module.{k.fqn}", k.offset, k.index): v for k, v in metadata.storage_data.items()
    }  # fmt: skip
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"brings no hf/config\.json along"):
        export_hf(tmp_path, tmp_path / "out")
    export_hf(tmp_path, tmp_path / "out", config_from=qwen3)
    assert_equal(weights(tmp_path / "out"), weights(qwen3))


def test_a_pickle_that_wants_to_run_something_does_not(qwen3: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    import pickle

    import_hf(qwen3, tmp_path / "megatron")
    (tmp_path / "megatron" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot be read"):
        MegatronSource(tmp_path / "megatron")
    assert not (tmp_path / "ran").exists()
