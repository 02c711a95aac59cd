"""config.json -> ModelShape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.convert.architecture.deepseek_fields import LatentShape, SigmoidRouter
from megatron_rl.convert.architecture.rope import RopeScaling, YarnScaling
from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.errors import UserError

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# The fields of three published checkpoints, as transformers 4 wrote them.
LLAMA_V4: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
QWEN2_V4: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 151936,
}  # fmt: skip
QWEN3_V4: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_V4: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
DEEPSEEK_V4: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }, "rms_norm_eps": 1e-06, "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip
MISTRAL_V4 = {name: value for name, value in MIXTRAL_V4.items() if "expert" not in name and "router" not in name} | {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"],
}  # fmt: skip
ALL_V4 = {
    "llama": LLAMA_V4,
    "mistral": MISTRAL_V4,
    "qwen2": QWEN2_V4,
    "qwen3": QWEN3_V4,
    "mixtral": MIXTRAL_V4,
    "deepseek_v3": DEEPSEEK_V4,
}


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def to_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same model in transformers 5's spelling."""
    new = dict(config)
    theta, scaling = new.pop("rope_theta"), new.pop("rope_scaling", None)
    scaling = {"rope_type" if name == "type" else name: value for name, value in (scaling or {}).items()}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **scaling}
    new["dtype"] = new.pop("torch_dtype")
    return new


def test_llama_with_scaled_rope(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, LLAMA_V4))
    assert (shape.family, shape.num_layers, shape.hidden_size, shape.head_dim) == ("llama", 16, 2048, 64)
    assert (shape.num_attention_heads, shape.num_key_value_heads, shape.vocab_size) == (32, 8, 128256)
    assert (shape.rope_theta, shape.rope_scaling) == (500000.0, RopeScaling(32.0, 1.0, 4.0, 8192))
    assert (shape.tied, shape.qkv_bias, shape.proj_bias, shape.mlp_bias, shape.qk_norm) == (True, *4 * (False,))
    assert (shape.bos_token_id, shape.eos_token_ids, shape.pad_token_id) == (128000, (128001, 128008, 128009), None)
    assert (shape.norm_eps, shape.dtype, shape.max_position_embeddings) == (1e-5, "bfloat16", 131072)


def test_qwen2_has_biases_without_saying_so(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, QWEN2_V4))
    assert (shape.head_dim, shape.qkv_bias, shape.proj_bias, shape.qk_norm) == (64, True, False, False)
    assert shape.eos_token_ids == (151645,)
    assert read_shape(write(tmp_path, QWEN2_V4 | {"attention_bias": True})) == shape  # its class has no such switch


def test_qwen3_has_its_own_head_dim_and_qk_norm(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, QWEN3_V4))
    assert (shape.head_dim, shape.qkv_bias, shape.proj_bias, shape.qk_norm) == (128, False, False, True)
    assert shape.head_dim != shape.hidden_size // shape.num_attention_heads


def test_mixtral_has_experts_as_wide_as_it_says_of_its_mlp(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, MIXTRAL_V4))
    assert (shape.num_experts, shape.num_experts_per_tok, shape.moe_intermediate_size) == (8, 2, 14336)
    assert (shape.norm_topk_prob, shape.head_dim, shape.rope_theta, shape.norm_eps) == (True, 128, 1e6, 1e-5)
    absent = ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "sliding_window")
    assert read_shape(write(tmp_path, {k: v for k, v in MIXTRAL_V4.items() if k not in absent})) == shape


def test_deepseek_v3_as_it_was_released(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, DEEPSEEK_V4))
    assert shape.latent == LatentShape(1536, 512, 128, 64, 128)
    assert (shape.head_dim, shape.rotary_dim, shape.has_query_latent, shape.has_plain_query) == (192, 64, True, False)
    assert (shape.num_experts, shape.num_experts_per_tok, shape.moe_intermediate_size) == (256, 8, 2048)
    assert (shape.num_dense_layers, shape.num_shared_experts, shape.num_mtp_layers) == (3, 1, 1)
    assert shape.sigmoid_router == SigmoidRouter(num_groups=8, groups_per_tok=4, scaling_factor=2.5)
    assert shape.rope_scaling == YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert (shape.fp8_block, shape.dtype) == ((128, 128), "bfloat16")
    plain = read_shape(write(tmp_path, DEEPSEEK_V4 | {"q_lora_rank": None, "quantization_config": None}))
    assert (plain.has_query_latent, plain.has_plain_query, plain.fp8_block) == (False, True, None)


def test_yarn_without_its_optional_fields(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, DEEPSEEK_V4 | {"rope_scaling": YARN}))
    assert shape.rope_scaling == YarnScaling(4.0, 32768, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0)


@pytest.mark.parametrize("family", ALL_V4)
def test_both_spellings_give_one_shape(family: str, tmp_path: Path) -> None:
    old = read_shape(write(tmp_path, ALL_V4[family]))
    assert read_shape(write(tmp_path, to_v5(ALL_V4[family]))) == old
    both = {**ALL_V4[family], **to_v5(ALL_V4[family])}  # a file written for both is fine while it agrees
    assert read_shape(write(tmp_path, both)) == old
    hash(old)


@pytest.mark.parametrize("family", ALL_V4)
def test_what_transformers_writes_is_read_back(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **{k: v for k, v in to_v5(ALL_V4[family]).items() if k != "model_type"})
    config.save_pretrained(tmp_path)
    assert read_shape(tmp_path) == read_shape(write(tmp_path, ALL_V4[family]))


def test_biases_follow_the_config(tmp_path: Path) -> None:
    llama = read_shape(write(tmp_path, LLAMA_V4 | {"attention_bias": True, "mlp_bias": True}))
    assert (llama.qkv_bias, llama.proj_bias, llama.mlp_bias) == (True, True, True)
    qwen3 = read_shape(write(tmp_path, QWEN3_V4 | {"attention_bias": True}))
    assert (qwen3.qkv_bias, qwen3.proj_bias, qwen3.mlp_bias) == (True, True, False)


def test_absent_fields_have_the_class_defaults(tmp_path: Path) -> None:
    absent = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings",
              "torch_dtype", "eos_token_id", "hidden_act", "architectures")  # fmt: skip
    shape = read_shape(write(tmp_path, {k: v for k, v in LLAMA_V4.items() if k not in absent}))
    assert (shape.num_key_value_heads, shape.head_dim, shape.rope_theta, shape.norm_eps) == (32, 64, 1e4, 1e-6)
    assert (shape.rope_scaling, shape.tied, shape.dtype, shape.eos_token_ids) == (None, False, "float32", ())


# Members of the families by what sets them apart from the file above: fields that change nothing, that are null, or are ours.
MEMBERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama-2": (
        "llama", {"rope_scaling": None, "rope_theta": None, "head_dim": None, "pretraining_tp": 2, "eos_token_id": 2},
        {"rope_theta": 1e4, "rope_scaling": None, "head_dim": 64},
    ),
    "SmolLM2": (
        "llama",
        {"rope_scaling": None, "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": {}}},
        {"rope_scaling": None},
    ),
    "DeepSeek-R1-Distill-Qwen": ("qwen2", {"use_mrope": False, "sliding_window": 4096, "tie_word_embeddings": False}, {}),
    "Qwen2.5-Math": ("qwen2", {"sliding_window": 4096, "max_position_embeddings": 4096}, {}),
    "Qwen2.5-1M": ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}, "max_position_embeddings": 1010000}, {}),
    "QwQ": ("qwen2", {"rope_scaling": None, "max_window_layers": 64, "tie_word_embeddings": False}, {}),
    "Qwen3 with biases": ("qwen3", {"attention_bias": True}, {"qkv_bias": True, "proj_bias": True, "mlp_bias": False}),
    "Mistral-7B-v0.3": ("mistral", {}, {"qkv_bias": False, "proj_bias": False, "head_dim": 128, "num_experts": 0}),
    "Mistral-Nemo": ("mistral", {"head_dim": 160}, {"head_dim": 160}),
    "Mixtral with a window as long as its context": ("mixtral", {"sliding_window": 32768}, {}),
    "Moonlight": (
        "deepseek_v3",
        {
            "q_lora_rank": None, "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1, "n_routed_experts": 64,
            "num_experts_per_tok": 6, "n_shared_experts": 2, "num_attention_heads": 16, "num_key_value_heads": 16,
            "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "quantization_config": None, "rope_scaling": None,
            "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "hidden_size": 2048, "num_hidden_layers": 27,
            "max_position_embeddings": 8192, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1,
        },
        {"norm_eps": 1e-5, "has_plain_query": True, "rope_theta": 5e4, "rope_scaling": None, "num_experts": 64},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_a_well_known_member_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    family, changes, expected = MEMBERS[name]
    shape = read_shape(write(tmp_path, ALL_V4[family] | changes))
    assert shape.family == family
    assert {field: getattr(shape, field) for field in expected} == expected


def test_a_mistral_without_the_field_has_the_window_of_its_class(tmp_path: Path) -> None:
    silent = {name: value for name, value in MISTRAL_V4.items() if name != "sliding_window"}
    with pytest.raises(UserError, match="is 4096 tokens, less than the context"):
        read_shape(write(tmp_path, silent))
    read_shape(write(tmp_path, silent | {"max_position_embeddings": 4096}))


def test_no_refusal_of_a_feature_asks_to_edit_the_file(tmp_path: Path) -> None:
    """A file edited to get past a refusal would describe another model than its weights are."""
    for family, changes in (
        ("mixtral", {"sliding_window": 4096}), ("qwen2", {"use_sliding_window": True}),
        ("deepseek_v3", {"model_type": "kimi_k2"}),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}), ("qwen3", {"partial_rotary_factor": 0.5}),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            read_shape(write(tmp_path, ALL_V4[family] | changes))
        assert not {"remove", "set", "correct", "edit"} & set(caught.value.fix.split()), caught.value


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"model_type": "gpt_oss"}, "model_type"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window"),
    ("mistral", {"sliding_window": 4096}, "sliding_window"),
    ("deepseek_v3", {"model_type": "kimi_k2"}, "model_type"),
    ("mixtral", {"num_local_experts": None}, "num_local_experts"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ("mixtral", {"rope_scaling": YARN}, "rope_scaling.rope_type"),
    ("mixtral", {"quantization_config": DEEPSEEK_V4["quantization_config"]}, "quantization_config"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
    ("deepseek_v3", {"num_key_value_heads": 64}, "num_key_value_heads"),
    ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("deepseek_v3", {"n_group": 7}, "n_group"),
    ("deepseek_v3", {"topk_group": 9}, "topk_group"),
    ("deepseek_v3", {"first_k_dense_replace": 61}, "first_k_dense_replace"),
    ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
    ("deepseek_v3", {"n_shared_experts": None}, "n_shared_experts"),
    ("deepseek_v3", {"rope_scaling": {"type": "llama3", **LLAMA3}}, "rope_scaling.high_freq_factor"),
    ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 40.0}}, "original_max_position_embeddings"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "mscale": 1.0}}, "mscale_all_dim"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.weight_block_size"),
    ("deepseek_v3", {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, "auto_map"),
    ("qwen2", {"model_type": None}, "model_type"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
    ("qwen2", {"rope_scaling": YARN}, "rope_scaling.rope_type"),
    ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.rope_type"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "rope_parameters.mrope_section"),
    ("qwen3", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
    ("qwen3", {"rope_parameters": [1]}, "rope_parameters"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": "8"}}, "rope_scaling.factor"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("qwen3", {"rope_theta": 0}, "rope_theta"),
    ("qwen3", {"head_dim": 63}, "head_dim"),
    ("qwen2", {"hidden_size": 900}, "hidden_size"),
    ("qwen3", {"hidden_size": None}, "hidden_size"),
    ("qwen3", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("qwen3", {"vocab_size": "151936"}, "vocab_size"),
    ("qwen3", {"intermediate_size": True}, "intermediate_size"),
    ("qwen3", {"num_key_value_heads": 5}, "num_key_value_heads"),
    ("qwen3", {"num_key_value_heads": None}, "num_key_value_heads"),
    ("qwen3", {"max_position_embeddings": None}, "max_position_embeddings"),
    ("qwen3", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ("qwen3", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("qwen3", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
    ("qwen3", {"dtype": "int8"}, "dtype"),
    ("qwen3", {"eos_token_id": "</s>"}, "eos_token_id"),
    ("qwen3", {"bos_token_id": [1, 2]}, "bos_token_id"),
]


@pytest.mark.parametrize(("family", "changes", "field"), WRONG, ids=[f"{f}-{'-'.join(c)}-{n}" for f, c, n in WRONG])
def test_wrong_field_is_named(family: str, changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_shape(write(tmp_path, ALL_V4[family] | changes))
    assert caught.value.field.startswith(str(tmp_path / "config.json"))
    assert caught.value.field.endswith(field)
    assert caught.value.rule and caught.value.fix


@pytest.mark.parametrize("content", [None, "{", "[1]", "\x80"])
def test_unreadable_file(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_shape(tmp_path)


def test_shape_kinds_and_table_do_not_import_torch() -> None:
    code = """
import sys
import megatron_rl.convert.architecture.shape, megatron_rl.convert.tables.kinds, megatron_rl.convert.tables.table
sys.exit(any(name in sys.modules for name in ("torch", "transformers", "safetensors", "megatron.core")))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
