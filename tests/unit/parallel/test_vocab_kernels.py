"""The Triton kernels: in Triton's interpreter against float64, and compiled for Hopper, both without a GPU.

Triton is not a part of the CPU environment, where SGLang and Megatron-Core would find it and take other paths. It lies in a
folder of its own (`make test-kernels`), and only forked children have that on their path. On a GPU machine it comes with torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.parallel import vocab
from megatron_rl.parallel.vocab import vocab_parallel_statistics
from tests.forked import run_ranks
from tests.unit.parallel.test_vocab import CUTS, TOKENS, VOCAB, forward_twice, on_rank, oracle, statistics

FOLDER = Path(__file__).parents[3] / "build" / "triton"
needs_triton = pytest.mark.skipif(
    not FOLDER.is_dir() and PathFinder.find_spec("triton") is None, reason="Triton is not installed: make test-kernels"
)


def forget_triton() -> None:
    """Let the next import run all of Triton's Python again: Megatron-Core has imported it where it is installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]:
        del sys.modules[name]


def with_triton(function: Callable[..., Any], *args: Any) -> Any:
    forget_triton()
    if FOLDER.is_dir():
        sys.path.insert(0, str(FOLDER))
    return function(*args)


def interpreted(function: Callable[..., Any], *args: Any) -> Any:
    """With kernels in Triton's interpreter, whatever the device. In a forked child: Triton reads the variable at import."""
    os.environ["TRITON_INTERPRET"] = "1"
    vocab.uses_kernels = lambda _device: True
    return with_triton(function, *args)


@dataclass(frozen=True)
class Case:
    """Shapes of a block-wise run over logits that are given, so that only the kernels' own error counts."""

    tokens: int
    words: int
    block: int
    """Columns of a block; the last has the rest, and ``padding`` columns more."""
    padding: int = 0
    temperature: float = 1.0
    std: float = 3.0
    gradient_of: str = "both"
    tile: int = 4096


CASES = {
    "one block": Case(5, 300, 300),
    "several tiles, the last not full": Case(3, 9000, 9000),
    "small tiles, odd width": Case(7, 1001, 1001, tile=64),
    "odd blocks": Case(6, 1003, 77, tile=64),
    "padding": Case(5, 291, 128, padding=93),
    "padding beyond the last tile": Case(4, 60, 60, padding=140, tile=64),
    "temperature": Case(5, 700, 256, temperature=0.7),
    "temperature and padding": Case(5, 700, 256, padding=68, temperature=0.7),
    "log-prob alone": Case(5, 700, 256, temperature=0.7, gradient_of="log_prob"),
    "entropy alone": Case(5, 700, 256, temperature=0.7, gradient_of="entropy"),
    "one token": Case(1, 515, 200),
    "one word a block": Case(3, 5, 1),
    "ten thousand in size": Case(6, 400, 100, std=1e4),
    "ten thousand in size, tempered": Case(6, 400, 100, std=1e4, temperature=0.7),
    "all alike": Case(3, 500, 200, std=0.0),
    "Qwen's vocabulary": Case(2, 151_936, 65_536, padding=128),
}


def errors(case: Case) -> dict[str, float]:
    """Largest errors: of log-prob and entropy relative to the largest logit or 1, of the gradient relative to its largest."""
    from megatron_rl.parallel import vocab_kernels

    vocab_kernels.TILE = case.tile
    generator = torch.Generator().manual_seed(case.words)
    logits = torch.randn(case.tokens, case.words, generator=generator) * case.std
    if case.std == 1e4:  # both ends, and a tie at the top
        logits[0, ::2], logits[0, 1::2] = 1e4, -1e4
    labels = torch.randint(0, case.words, (case.tokens,), generator=generator)
    labels[-1] = case.words - 1
    a, b = torch.randn(2, case.tokens, generator=generator)
    a, b = (None if case.gradient_of == "entropy" else a), (None if case.gradient_of == "log_prob" else b)
    unit = 1 / case.temperature
    largest = torch.full((case.tokens,), float("-inf"))
    total, dot, label_logit = torch.zeros(3, case.tokens)

    def blocks() -> list[tuple[Tensor, dict[str, Any]]]:
        """Of fresh logits, since kernels overwrite them; padding is larger than any word."""
        parts = list(logits.split(case.block, dim=1))
        sizes = [part.shape[1] for part in parts]
        parts[-1] = torch.cat([parts[-1], torch.full((case.tokens, case.padding), 3e4)], dim=1)
        starts = range(0, case.words, case.block)
        return [
            (part.contiguous().clone(), {"columns": labels - start, "num_words": size, "unit": unit})
            for part, start, size in zip(parts, starts, sizes)
        ]

    for block, where in blocks():
        vocab_kernels.add_block(block, **where, largest=largest, total=total, dot=dot, label_logit=label_logit)
    log_total = total.log()
    entropy = log_total - dot / total
    of = {"of_label": None if a is None else a * unit, "of_entropy": None if b is None else b * unit}
    given = {"largest": largest, "log_total": log_total, "entropy": entropy, **of, "dtype": torch.float32}
    found = [vocab_kernels.gradient(block, **where, **given) for block, where in blocks()]
    found[-1], pad = found[-1].tensor_split([found[-1].shape[1] - case.padding], dim=1)

    true = logits.double().requires_grad_()
    log_p = (true / case.temperature).log_softmax(-1)
    log_probs, entropies = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    loss = (0 if a is None else a.double() @ log_probs) + (0 if b is None else b.double() @ entropies)
    loss.backward()
    log_probs, entropies = log_probs.detach(), entropies.detach()
    scale = max(1.0, float(logits.abs().max()) * unit)
    return {
        "log_prob": float(((label_logit - largest) * unit - log_total - log_probs).abs().max()) / scale,
        "entropy": float((entropy - entropies).abs().max()) / scale,
        "gradient": float((torch.cat(found, 1) - true.grad).abs().max() / true.grad.abs().max().clamp(min=1e-3)),
        "padding": float(pad.abs().max()) if case.padding else 0.0,
    }


def errors_of_all() -> dict[str, dict[str, float]]:
    return {name: errors(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    return run_ranks(interpreted, 1, errors_of_all)[0]


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_float64(name: str, measured: dict[str, dict[str, float]]) -> None:
    found = measured[name]
    assert max(found["log_prob"], found["entropy"], found["gradient"]) < 1e-5, found
    assert found["padding"] == 0.0


@needs_triton
@pytest.mark.parametrize(
    ("world_size", "temperature"), [(1, 0.6), (2, 1.0), (4, 0.6)]
)  # the last of 4 has only padding
def test_the_whole_path_equals_float64(world_size: int, temperature: float) -> None:
    true = oracle(temperature)
    for results in run_ranks(interpreted, world_size, on_rank, temperature, (7, 7 * 11)):
        assert torch.equal(results.pop("is_top"), true["is_top"])
        for name, mine in results.items():
            torch.testing.assert_close(mine.double(), true[name], rtol=1e-5, atol=1e-5, msg=name)
        assert results["weight.grad"][VOCAB:].eq(0).all(), "padded rows have a gradient"


@needs_triton
def test_gradient_mode_does_not_change_a_bit() -> None:
    assert run_ranks(interpreted, 1, forward_twice) == [True]


def of_infinite_hidden_states() -> tuple[Tensor, Tensor]:
    hidden, weight = torch.ones(TOKENS, 16), torch.ones(48, 16)
    hidden[3, 5] = float("inf")
    found = statistics(hidden, weight)
    return found.log_probs, found.entropy


@needs_triton
def test_infinite_logits_are_seen() -> None:
    """The trainer refuses log-probs that are not finite."""
    for values in run_ranks(interpreted, 1, of_infinite_hidden_states)[0]:
        assert values.isfinite().tolist() == [token != 3 for token in range(TOKENS)]


# Products as a GPU does them: exact products of bfloat16, summed and returned in float32; and as torch does them on its own.
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float32": lambda a, b: a.float() @ b.float(),
    "rounded": lambda a, b: (a.float() @ b.float()).bfloat16().float(),
}


def bfloat16_errors(std: float, products: str) -> dict[str, float]:
    """Of a bfloat16 model whose logits have this spread, tokens drawn from it, given the same hidden states."""
    import torch.distributed as dist

    vocab.multiplies_bfloat16_fast = lambda _device: True
    vocab.product = PRODUCTS[products]
    vocab.add_product = lambda total, a, b: total.add_(a.float() @ b.float())
    vocab.CHUNK_TOKENS, vocab.BLOCK_ELEMENTS = {"cpu": 16}, {"cpu": 16 * 1024}
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(24, 256, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(2048, 256, generator=generator) * std / 16).bfloat16().requires_grad_()
    exact, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    log_p = (exact @ exact_weight[:2000].t()).log_softmax(-1)
    labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)[:, 0]
    true, entropy = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (true.sum() + entropy.sum()).backward()
    true, entropy = true.detach(), entropy.detach()
    group = dist.group.WORLD
    found = vocab_parallel_statistics(hidden, weight, labels, vocab_size=2000, temperature=1.0, tp_group=group)
    (found.log_probs.sum() + found.entropy.sum()).backward()
    return {
        "log_prob": float((found.log_probs.detach() - true).abs().max()),
        "entropy": float((found.entropy.detach() - entropy).abs().max()),
        "hidden": float((hidden.grad - exact.grad).norm() / exact.grad.norm()),
        "weight": float((weight.grad - exact_weight.grad).norm() / exact_weight.grad.norm()),
    }


@needs_triton
@pytest.mark.parametrize("std", [1.4, 3.0, 6.0])
def test_log_probs_of_a_bfloat16_model_are_exact(std: float) -> None:
    """Up to sums in float32. Gradients leave as bfloat16, which the interpreter cuts off where a GPU rounds."""
    found = run_ranks(interpreted, 1, bfloat16_errors, std, "float32")[0]
    assert found["log_prob"] < 1e-5 and found["entropy"] < 1e-5, found
    assert found["hidden"] < 0.01 and found["weight"] < 0.01, found
    rounded = run_ranks(bfloat16_errors, 1, std, "rounded")[0]
    assert rounded["log_prob"] > 1e-3, "logits in bfloat16 cost nothing here: the test shows nothing"


def assembly(folder: Path) -> dict[str, tuple[str, str]]:
    """PTX of both kernels, compiled for Hopper with arguments as blocks on a GPU have them, and the assembler's report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_rl.parallel import vocab_kernels

    pointers = ["largest", "total", "dot", "label_logit", "log_total", "entropy", "of_label", "of_entropy", "logits"]
    kinds = dict.fromkeys(pointers, "*fp32") | {"columns": "*i64", "width": "i32", "num_words": "i32", "unit": "fp32"}
    variants = {
        "statistics": (vocab_kernels._statistics, {}),
        "gradient": (vocab_kernels._gradient, {"found": "*bf16"}),
        "gradient without entropy": (vocab_kernels._gradient, {"found": "*bf16", "of_entropy": "constexpr"}),
        "gradient without log-prob": (vocab_kernels._gradient, {"found": "*bf16", "of_label": "constexpr"}),
        "gradient in float32": (vocab_kernels._gradient, {"found": "*fp32"}),
    }
    found = {}
    for name, (kernel, change) in variants.items():
        signature = {argument: (kinds | change | {"TILE": "constexpr"})[argument] for argument in kernel.arg_names}
        constants = {key: None for key, kind in change.items() if kind == "constexpr"} | {"TILE": vocab_kernels.TILE}
        # Tensors begin at 16 bytes, and widths of blocks are multiples of 128; the number of words is any.
        aligned = [key for key, kind in signature.items() if kind[0] == "*" or key == "width"]
        attributes = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": vocab_kernels.NUM_WARPS}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert len(compiled.asm["cubin"]) > 1000
        (folder / "kernel.ptx").write_text(compiled.asm["ptx"])
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", folder / "kernel.ptx", "-o", os.devnull]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        found[name] = compiled.asm["ptx"], report
    return found


@needs_triton
def test_kernels_compile_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (text, report) in run_ranks(with_triton, 1, assembly, tmp_path)[0].items():
        assert ".target sm_90" in text
        assert len(re.findall(r"ld\.global\.v4\.b32", text)) == vocab.ALIGNED_WORDS // 32, f"{name}: narrow loads"
        assert "0 bytes spill stores, 0 bytes spill loads" in report, report
        assert ("cvt.rn.bf16" in text) == (name.startswith("gradient") and "float32" not in name), (
            "rounding to bfloat16"
        )


def modules_without_kernels() -> bool:
    on_rank(1.0, CUTS[0])
    return "triton" in sys.modules or "megatron_rl.parallel.vocab_kernels" in sys.modules


def test_a_cpu_takes_torch_and_never_imports_triton() -> None:
    assert not vocab.uses_kernels(torch.device("cpu"))
    assert run_ranks(with_triton, 1, modules_without_kernels) == [False]


def choices(folder: Path) -> list[bool]:
    cuda = torch.device("cuda")
    forget_triton()
    (folder / "without").mkdir()
    (folder / "with" / "triton").mkdir(parents=True)
    (folder / "with" / "triton" / "__init__.py").touch()
    sys.meta_path[:] = [PathFinder]  # without the stand-in that SGLang gets on a CPU
    sys.path[:] = [str(folder / "without")]
    found = [vocab.uses_kernels(cuda)]
    sys.path[:] = [str(folder / "with")]
    return [*found, vocab.uses_kernels(cuda), vocab.uses_kernels(torch.device("cpu"))]


def test_a_gpu_takes_kernels_where_triton_can_be_imported(tmp_path: Path) -> None:
    assert run_ranks(choices, 1, tmp_path) == [[False, True, False]]


def types_of_products() -> list[torch.dtype]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight = (torch.empty(size, 8, device="cuda", dtype=torch.bfloat16) for size in (4, 6))
        return [vocab.product(hidden, weight.t()).dtype, vocab.product(hidden.float(), weight.float().t()).dtype]


def test_products_on_a_gpu_are_float32() -> None:
    """What torch says of the call without running it. Of addmm it has no such word, so only the name is checked."""
    assert run_ranks(types_of_products, 1) == [[torch.float32] * 2]
    assert "dtype_out" in torch.ops.aten.addmm.overloads()
