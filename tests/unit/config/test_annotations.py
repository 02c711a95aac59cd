"""Kinds of values, read from upstream's sources: what they take, for the installed versions and for spellings of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.config.annotations import read_fields

TINY = Path(__file__).parents[2] / "tiny.yaml"
CHOICES = "BACKENDS = ['a', 'b']\n"


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        ("int", [0, -5, 2**40], [1.0, True, "1", None, [1]]),
        ("float", [0, 1.5, -2], [True, "1", None, float("nan"), float("inf")]),
        ("bool", [True, False], [0, 1, "true", None]),
        ("str", ["", "x"], [1, True, None, ["x"]]),
        ("Optional[int]", [None, 1], ["1", True]),
        ("int | None", [None, 1], ["1"]),
        ("'Optional[int]'", [None, 1], ["1"]),
        ("Union[int, List[int]]", [1, [1, 2], []], ["1", ["1"], None]),
        ("Optional[Union[str, List[str]]]", [None, "x", ["x"]], [1, [1]]),
        ("Literal['full', 'selective']", ["full"], ["half", None, 1]),
        ("Optional[Literal[2, 3]]", [2, None], [4, "2"]),
        ("list", [[], [1, "a"]], [1, "a", {}]),
        ("Tuple[int, int]", [[1, 2]], [[1], [1, "a"], 1]),
        ("tuple[int, ...]", [[1], [1, 2, 3], (1,)], []),
        ("Dict[str, Any]", [{}, {"a": 1}], [1, [1]]),
        ("Callable", [], ["f", None, 1]),
        ("Optional[Callable]", [None], ["f"]),
        ("Union[str, CudaGraphScope, List[str]]", ["full", ["full"], 5], []),
        ("torch.dtype", ["bf16", 5, None], []),
        ("SomethingNew[int]", [1, "a", None], []),
        ("A[int, 'help']", [1], ["1"]),
        ("A[Optional[str], Arg(help='h', choices=BACKENDS)]", ["a", None], ["c", 1]),
        ("A[str, Arg(choices=['a'])]", ["a"], ["b", None]),
        ("A[Optional[List[str]], Arg(choices=['a', 'b'])]", [["a", "b"], None, "a"], [["c"]]),
        ("A[str, Arg(choices=elsewhere())]", ["x"], [5]),
        ("A[int, Arg(type_parser=human_readable_int)]", [1, "64k"], []),
    ],
)
def test_what_an_annotation_takes(annotation: str, right: list[object], wrong: list[object]) -> None:
    kind = read_fields(f"{CHOICES}class C:\n    x: {annotation} = ...\n")["x"].kind
    assert [value for value in right if not kind.fits(value)] == []
    assert [value for value in wrong if kind.fits(value)] == []


def test_a_default_of_null_is_taken() -> None:
    assert read_fields("class C:\n    x: bool = None\n")["x"].kind.fits(None)


def test_other_names_of_an_option() -> None:
    found = read_fields("class C:\n    tp_size: A[int, Arg(help='h', aliases=['--tensor-parallel-size'])] = 1\n")
    assert found["tp_size"].aliases == ("tensor_parallel_size",)


MEGATRON, SERVER = "policy.megatron_cfg", "rollout.sglang_cfg"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{MEGATRON}.moe_aux_loss_coeff=0"],
        [f"{MEGATRON}.moe_aux_loss_coeff=[0.1, 1]"],
        [f"{MEGATRON}.recompute_granularity=selective", f"{MEGATRON}.recompute_modules=[core_attn, mlp]"],
        [f"{MEGATRON}.recompute_granularity=null"],
        [f"{MEGATRON}.fp8=hybrid", f"{MEGATRON}.fp8_recipe=tensorwise"],
        [f"{MEGATRON}.fp8=null"],
        [f"{MEGATRON}.init_method_std=1e-2"],
        [f"{MEGATRON}.virtual_pipeline_model_parallel_size=null"],
        [f"{MEGATRON}.expert_tensor_parallel_size=null"],
        [f"{MEGATRON}.gradient_accumulation_fusion=false"],
        ["policy.ddp_cfg.bucket_size=40000000"],
        ["policy.ddp_cfg.bucket_size=null"],
        ["policy.ddp_cfg.overlap_grad_reduce=true"],
        ["policy.optim.optimizer_cfg.log_num_zeros_in_grad=true"],
        ["policy.optim.optimizer_cfg.loss_scale=1024"],
        [
            "policy.optim.optimizer_cfg.use_precision_aware_optimizer=true",
            "policy.optim.optimizer_cfg.exp_avg_dtype=bf16",
        ],
        [f"{SERVER}.tp_size=2"],
        [f"{SERVER}.mem_fraction_static=0.8"],
        [f"{SERVER}.max_total_tokens=64k"],
        [f"{SERVER}.attention_backend=triton"],
        [f"{SERVER}.attention_backend=null"],
        [f"{SERVER}.served_model_name=7"],
        [f"{SERVER}.log_requests_level=2"],
        [f"{SERVER}.cuda_graph_bs_decode=[1, 2]"],
        [f"{SERVER}.custom_weight_loader=a.b"],
        [f"{SERVER}.disable_radix_cache=true"],
        [f"{SERVER}.context_length=4096"],
    ],
)
def test_right_values_pass(overrides: list[str]) -> None:
    load_config(TINY, ["policy.model_path=m", *overrides])
