"""A GPT of a few thousand parameters whose weights depend on their names only, so that all layouts hold the same model.

Norm weights are drawn from U(0.5, 1.5) and biases are not zero: with the usual ones and zeros, a wrong gradient of
either can pass unseen.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

VOCAB, SEQ, BATCH = 32, 8, 4


def make_config(**overrides: Any) -> TransformerConfig:
    """Two layers of hidden size 16, with biases, without dropout; settings that CPU needs included."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 32,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "calculate_per_token_loss": True,
    }
    return TransformerConfig(**{**settings, **overrides})


def make_moe_config(**overrides: Any) -> TransformerConfig:
    """The same with four experts, two a token, no auxiliary loss."""
    settings = {
        "add_bias_linear": False,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 32,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }
    return make_config(**{**settings, **overrides})


def init_parallel(config: TransformerConfig) -> None:
    """Build Megatron's process groups for the sizes in ``config``, and seed its generators."""
    parallel_state.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(1)


def make_model(config: TransformerConfig) -> GPTModel:
    """The whole model of a rank (no pipeline), with the weights of this module."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization=config.normalization
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    for name, parameter in model.named_parameters():
        name = global_name(name, config)
        parameter.data.copy_(_shard(_full_value(name, _full_shape(parameter)), parameter))
    return model


def wrap(model: GPTModel, **ddp: Any) -> DistributedDataParallel:
    """DDP as training uses it."""
    model.config.finalize_model_grads_func = finalize_model_grads
    settings: dict[str, Any] = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True}
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(**{**settings, **ddp}), model)


def make_optimizer(model: DistributedDataParallel, **overrides: Any) -> MegatronOptimizer:
    """Adam with weight decay and clipping."""
    settings: dict[str, Any] = {
        "optimizer": "adam",
        "lr": 1e-2,
        "weight_decay": 0.01,
        "clip_grad": 1.0,
        "bf16": model.config.bf16,
        "params_dtype": model.config.params_dtype,
        "use_distributed_optimizer": model.ddp_config.use_distributed_optimizer,
    }
    return get_megatron_optimizer(OptimizerConfig(**{**settings, **overrides}), [model])


def forward_backward(model: DistributedDataParallel, seed: int = 0) -> float:
    """Gradients of the mean weighted cross-entropy of a batch of BATCH sequences, split over the data ranks.

    Returns:
        The mean over this rank's tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=generator)
    weights = torch.rand(BATCH, SEQ, generator=generator)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    tokens, weights = tokens.chunk(size)[rank], weights.chunk(size)[rank]
    model.zero_grad_buffer()

    def step(_iterator: Any, model: Any) -> tuple[Tensor, Any]:
        positions = torch.arange(SEQ).expand(len(tokens), SEQ)
        logits = model(tokens[:, :-1], positions, None)

        def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            labels = tokens[:, 1:].t().contiguous()
            per_token = vocab_parallel_cross_entropy(logits.float().transpose(0, 1).contiguous(), labels)
            total = (per_token * weights.t()).sum()
            return total, torch.tensor(weights.numel(), dtype=torch.int), {"loss": total.detach()}

        return logits, loss

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=model,
        num_microbatches=1,
        seq_length=SEQ,
        micro_batch_size=len(tokens),
        forward_only=False,
    )
    return outputs[0]["loss"].item() / weights.numel()


def local_grads(model: DistributedDataParallel) -> dict[str, tuple[Tensor, int | None]]:
    """Of each parameter of this rank: gradient and the dimension that is split over tensor ranks (None: none is)."""
    return {
        global_name(name, model.config): (parameter.main_grad.clone(), _split_dim(parameter))
        for name, parameter in model.module.named_parameters()
    }


def join_grads(ranks: list[dict[str, tuple[Tensor, int | None]]]) -> dict[str, Tensor]:
    """Whole gradients from the parts of the tensor-parallel ranks, those that all hold compared on the way."""
    joined = {}
    for name, (grad, dim) in ranks[0].items():
        parts = [rank[name][0] for rank in ranks]
        if dim is None:
            for part in parts[1:]:
                torch.testing.assert_close(part, grad, msg=lambda text, name=name: f"ranks differ in {name}: {text}")
        joined[name] = grad if dim is None else torch.cat(parts, dim)
    return joined


def global_name(name: str, config: TransformerConfig) -> str:
    """Number the experts of all ranks through."""
    parts = name.split(".")
    if "local_experts" in parts and config.num_moe_experts:
        index = parts.index("local_experts") + 1
        num_local = config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        parts[index] = str(int(parts[index]) + num_local * parallel_state.get_expert_model_parallel_rank())
    return ".".join(parts)


def _split_dim(parameter: Tensor) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def _full_shape(parameter: Tensor) -> list[int]:
    shape, dim = list(parameter.shape), _split_dim(parameter)
    if dim is not None:
        shape[dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return shape


def _full_value(name: str, shape: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if "layernorm" in name and name.endswith("weight"):
        return 0.5 + torch.rand(shape, generator=generator)
    return 0.3 * torch.randn(shape, generator=generator)


def _shard(full: Tensor, parameter: Tensor) -> Tensor:
    dim = _split_dim(parameter)
    if dim is None:
        return full
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return full.chunk(size, dim)[rank]
