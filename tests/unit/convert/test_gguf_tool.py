"""tools/gguf_to_hf.py on a GGUF of a few kilobytes: weights, tokenizer, end token, errors, and nothing half-made."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.errors import UserError

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER = 1, 32, 4, 2, 48
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ", "a", "1", "2", "ĊĊ"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gguf_to_hf", Path(__file__).parents[3] / "tools" / "gguf_to_hf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hugging_face_weights() -> dict[str, torch.Tensor]:
    generator, layer = torch.Generator().manual_seed(1), "model.layers.0"
    head_dim = HIDDEN // HEADS
    shapes = {
        "model.embed_tokens.weight": (len(WORDS), HIDDEN), "model.norm.weight": (HIDDEN,),
        f"{layer}.input_layernorm.weight": (HIDDEN,), f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN), f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{layer}.self_attn.k_proj.weight": (KV_HEADS * head_dim, HIDDEN),
        f"{layer}.self_attn.v_proj.weight": (KV_HEADS * head_dim, HIDDEN),
        f"{layer}.mlp.gate_proj.weight": (INNER, HIDDEN), f"{layer}.mlp.up_proj.weight": (INNER, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


GGUF_NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "blk.0.attn_norm",
    "post_attention_layernorm": "blk.0.ffn_norm", "q_proj": "blk.0.attn_q", "k_proj": "blk.0.attn_k", "v_proj": "blk.0.attn_v",
    "o_proj": "blk.0.attn_output", "gate_proj": "blk.0.ffn_gate", "up_proj": "blk.0.ffn_up", "down_proj": "blk.0.ffn_down",
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    from gguf import GGUFWriter

    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, tensor in hugging_face_weights().items():
        (theirs,) = (new for old, new in GGUF_NAMES.items() if f"{old}.weight" in name)
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if heads:  # a GGUF has the halves of each head's rotary pairs beside each other
            tensor = tensor.view(heads, 2, -1, HIDDEN).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_becomes_a_folder(tool: ModuleType, file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tool.main(str(file), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    found, expected = dict(model.named_parameters()), hugging_face_weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert model.config.rms_norm_eps == 1e-5 and model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode("a\n\n12<|im_end|>") == [WORDS.index(word) for word in ("a", "ĊĊ", "1", "2", "<|im_end|>")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|im_end|>"
    assert "GGUF" not in (tmp_path / "hf" / "config.json").read_text()


def test_bfloat16(tool: ModuleType, file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tool.main(str(file), tmp_path / "hf", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}


def test_an_interrupted_conversion_leaves_no_folder(
    tool: ModuleType, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tool.write

    def write_and_end(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "write", write_and_end)
    with pytest.raises(KeyboardInterrupt):
        tool.main(str(file), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    monkeypatch.undo()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / ".seconds_of_model").touch()  # as examples leave it
    tool.main(str(file), tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "tiny.gguf"]


def test_wrong_sources_are_one_line(tool: ModuleType, file: Path, tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_bytes(b"PK\x03\x04")
    (tmp_path / "torn.gguf").write_bytes(file.read_bytes()[:500])
    for source, rule in (("missing.gguf", "cannot be read"), ("none.gguf", "is not a GGUF"), ("torn.gguf", "can read")):
        with pytest.raises(UserError) as caught:
            tool.main(str(tmp_path / source), tmp_path / "hf")
        assert caught.value.field == "SOURCE" and rule in caught.value.rule and not (tmp_path / "hf").exists()
    with pytest.raises(UserError, match="is there already"):
        tool.main(str(file), tmp_path)
