"""Hidden states -> log-probs, entropy and both gradients: ours against what holds logits. Hidden 1,024, vocabulary 151,936.

    naive     full float32 logits, log_softmax, entropy, autograd; then the weight's gradient into a float32 buffer
    chunked   1,024 tokens at a time, each keeping its float32 softmax for backward
    ours      parallel/vocab.py

    peak_memory_ratio, time_ratio   ours over naive: 4,096 tokens of which half are prompt
    *_without_prompt                the same with every token trained on
    time_vs_chunked                 ours over chunked, every token trained on
    time_tp2_vs_tp1                 two ranks of one thread over one rank of two threads
    seconds, gigabytes              ours at 2,048, 8,192 and 32,768 tokens: both grow linearly

Each figure comes from a process of its own, with the same allocator settings; memory is the peak above the inputs, the
float32 gradient of the weight (0.62 GB) included. Both run in bfloat16, or in float32 on CPUs that have no units for
bfloat16: there the naive path would take an hour, and ours, which then multiplies in float32, would win by nothing but that.

On a GPU, where seconds are the least of three, it also measures ``matmul_share``, the rate of ours over that of a plain
product, and others. None of them has entropy, and each leaves the weight's gradient in the weight's own type:

    liger_triton         Liger's fused loss with its Triton kernel
    liger_cute           its path for Hopper: tokens a multiple of 128, vocabulary of 256
    cut_cross_entropy    Apple's
    quack                QuACK's: its kernels fused for Hopper where they take the sizes, its chunks elsewhere

``ran`` says what ours and these were, and ``not_measured`` why one is missing. Figures are printed as soon as they are known,
in a line of JSON that holds all so far; compilers of the last two can take long, so they come last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np

from megatron_rl.process.lifetime import leave

HIDDEN, VOCABULARY = 1024, 151_936
_PAIR = {"peak_memory": "gigabytes", "time": "seconds"}
OTHERS = ("liger_triton", "cut_cross_entropy", "quack", "liger_cute")
OTHERS_LIMIT_S = 90.0
"""For one of them, compilation included."""


def main() -> None:
    """Measure everything; the figures are the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="smaller, for a quick look")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=usual_dtype())
    parser.add_argument(
        "--pair", action="store_true", help="naive and ours with half of the tokens prompt, nothing else"
    )
    parser.add_argument("--repeats", type=int, default=1, help="turns of that pair; medians of each side count")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        leave(measure_and_print(json.loads(arguments.one)))

    ran: dict[str, str] = {}

    def run(path: str, tokens: int = arguments.tokens, **how: object) -> dict[str, float]:
        sizes = {"hidden_size": arguments.hidden, "vocabulary": arguments.vocabulary}
        found = in_process(path=path, tokens=tokens, dtype=arguments.dtype, **sizes, **how)
        ran.update({path: found.pop("ran")} if "ran" in found else {})
        print(f"{path:8} {tokens:6} tokens {how}: {found['seconds']:.3f} s, {found['gigabytes']:.2f} GB", flush=True)
        return found

    half, all_rows = {"trained_share": 0.5}, {"trained_share": 1.0}

    def pair() -> tuple[dict[str, float], dict[str, float], list[float]]:
        """Naive and ours, and our share of the seconds in each turn."""
        turns = [(run("naive", **half), run("ours", **half)) for _ in range(arguments.repeats)]
        sides = [{key: statistics.median(found[key] for found in side) for key in side[0]} for side in zip(*turns)]
        each = [round(mine["seconds"] / theirs["seconds"], 3) for theirs, mine in turns]
        return sides[0], sides[1], each

    if arguments.pair:
        naive, ours, each = pair()
        ratios = {f"{what}_ratio": round(ours[key] / naive[key], 3) for what, key in _PAIR.items()}
        print(json.dumps({"dtype": arguments.dtype} | ratios | {"time_ratio_of_each_turn": each}))
        return
    figures: dict[str, float | list[float]] = {}
    not_measured = {} if on_gpu() else dict.fromkeys(OTHERS, "no GPU")

    def summary() -> str:
        rounded = {name: np.round(value, 3).tolist() for name, value in figures.items()}
        return json.dumps({"dtype": arguments.dtype} | rounded | {"ran": ran, "not_measured": not_measured})

    @contextmanager
    def noted(other: str) -> Iterator[None]:
        """Print what is known at the end. On a GPU another's failure is noted, and the rest goes on."""
        try:
            yield
        except RuntimeError as error:
            if not on_gpu():
                raise
            not_measured[other] = str(error)
        print(summary(), flush=True)

    def set_against(other: str, **names: str) -> None:
        """Add ours over another's seconds and gigabytes, under these names."""
        with noted(other):
            found = run(other, **all_rows)
            figures.update({names[of]: ours_all[of] / found[of] for of in names})

    ours_all = run("ours", **all_rows)
    if on_gpu():
        # Of each trained token: logits, once more for backward, and both gradients.
        operations = 4 * 2 * arguments.tokens * arguments.hidden * arguments.vocabulary
        figures["matmul_share"] = operations / ours_all["seconds"] / matmul_flops()
        print(summary(), flush=True)
    set_against("naive", seconds="time_ratio_without_prompt", gigabytes="peak_memory_ratio_without_prompt")
    set_against("chunked", seconds="time_vs_chunked")

    def set_against_others(*names: str) -> None:
        for other in names if on_gpu() else ():
            set_against(other, seconds=f"time_vs_{other}", gigabytes=f"peak_memory_vs_{other}")

    set_against_others(*OTHERS[:2])
    with noted("naive"):
        naive, ours, _ = pair()
        figures |= {f"{what}_ratio": ours[key] / naive[key] for what, key in _PAIR.items()}
        if not on_gpu():  # NCCL wants a GPU for each rank
            figures["time_tp2_vs_tp1"] = run("ours", ranks=2, **half)["seconds"] / ours["seconds"]
    table = {tokens: run("ours", tokens, **half) for tokens in (2048, 8192, 32768)}
    print("\n| tokens | seconds | GB above inputs |\n| --- | --- | --- |")
    for tokens, found in table.items():
        print(f"| {tokens} | {found['seconds']:.3f} | {found['gigabytes']:.2f} |")
    figures |= {name: [found[name] for found in table.values()] for name in ("seconds", "gigabytes")}
    print(summary(), flush=True)
    set_against_others(*OTHERS[2:])


def usual_dtype() -> str:
    """What one would train in on this machine."""
    import torch

    from megatron_rl.parallel.vocab import multiplies_bfloat16_fast

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bfloat16" if multiplies_bfloat16_fast(device) else "float32"


def on_gpu() -> bool:
    """Whether there is one."""
    import torch

    return torch.cuda.is_available()


def matmul_flops() -> float:
    """Of a bfloat16 product on this GPU."""
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "gpu"))
    from common import matmul_flops as measured

    return measured()


def in_process(*, ranks: int = 1, **how: object) -> dict[str, float]:
    """The slowest rank's seconds and the largest rank's memory, and what ran, where there is a choice.

    Raises:
        RuntimeError: with what a rank failed with, or that another library took too long.
    """
    from megatron_rl.launch.command import ALLOCATOR

    cores = len(os.sched_getaffinity(0))
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    "--one",
                    json.dumps({**how, "rank": rank, "ranks": ranks, "folder": folder}),
                ],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            limit = OTHERS_LIMIT_S if how["path"] in OTHERS else None
            outputs = [process.communicate(timeout=limit)[0] for process in processes]
        except subprocess.TimeoutExpired:
            for process in processes:
                process.kill()
                process.wait()
            raise RuntimeError(f"not done after {OTHERS_LIMIT_S:.0f} s") from None
    if any(process.returncode for process in processes):
        said = [json.loads(output.splitlines()[-1]).get("failed") for output in outputs if output.strip()]
        status = f"status {[process.returncode for process in processes]}"
        raise RuntimeError(next(filter(None, said), status))
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: max(each[name] for each in found) for name in found[0]}


def measure_and_print(how: dict) -> int:
    """One line of JSON: the figures, or why there are none. Returns the exit status."""
    try:
        print(json.dumps(measure(**how)))
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"[:400]}))
        return 1
    return 0


def measure(
    *,
    path: str,
    tokens: int,
    hidden_size: int,
    vocabulary: int,
    trained_share: float,
    rank: int,
    ranks: int,
    folder: str,
    dtype: str,
) -> dict[str, float | str]:
    """One forward and backward on this rank."""
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(tokens, hidden_size, device=device).to(kind).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=device) * 0.02).chunk(ranks)[rank].to(kind).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    trained = torch.arange(tokens, device=device) >= tokens * (1 - trained_share)
    factors = torch.randn(2, tokens, device=device) * trained

    def peak() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    work: Callable[..., str | None] = {
        "naive": naive, "chunked": chunked, "ours": ours, "liger_triton": liger_triton, "liger_cute": liger_cute,
        "cut_cross_entropy": cut_cross_entropy, "quack": quack,
    }[path]  # fmt: skip
    ran = None
    if device == "cuda":  # compilation and library set-up are not what is measured
        work(hidden, weight, labels, trained, factors)
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
    before, seconds = peak(), []
    for _ in range(3 if device == "cuda" else 1):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        ran = work(hidden, weight, labels, trained, factors)
        after = peak()
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group()
    return {"seconds": min(seconds), "gigabytes": after - before} | ({"ran": ran} if ran else {})


def _into_main_grad(weight) -> None:  # type: ignore[no-untyped-def]
    import torch

    main_grad = torch.zeros(weight.shape, device=weight.device)
    main_grad.add_(weight.grad)
    weight.grad = None


def naive(hidden, weight, labels, trained, factors) -> None:  # type: ignore[no-untyped-def]
    """What one writes first."""
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    log_probs = log_p.gather(1, labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (factors[0] @ log_probs + factors[1] @ entropy).backward()
    _into_main_grad(weight)


def chunked(hidden, weight, labels, trained, factors) -> None:  # type: ignore[no-untyped-def]
    """Chunks of tokens, trained rows only; autograd keeps each chunk's float32 softmax."""
    rows = trained.nonzero()[:, 0]
    for part in rows.split(1024):
        naive_part = (hidden[part] @ weight.t()).float().log_softmax(-1)
        log_probs = naive_part.gather(1, labels[part, None])[:, 0]
        entropy = -(naive_part.exp() * naive_part).sum(-1)
        (factors[0, part] @ log_probs + factors[1, part] @ entropy).backward()
    _into_main_grad(weight)


def ours(hidden, weight, labels, trained, factors) -> str:  # type: ignore[no-untyped-def]
    """As PolicyModel calls it."""
    import torch
    import torch.distributed as dist

    from megatron_rl.parallel.vocab import uses_kernels, vocab_parallel_statistics

    main_grad = torch.zeros(weight.shape, device=weight.device)
    rows = trained.nonzero()[:, 0]
    group = dist.group.WORLD
    assert group is not None
    found = vocab_parallel_statistics(
        hidden[rows], weight, labels[rows],
        vocab_size=weight.shape[0] * dist.get_world_size(), temperature=1.0, tp_group=group, main_grad=main_grad,
    )  # fmt: skip
    (factors[0, rows] @ found.log_probs + factors[1, rows] @ found.entropy).backward()
    return f"Triton {version('triton')}" if uses_kernels(hidden.device) else "torch"


def liger_triton(hidden, weight, labels, trained, factors) -> str:  # type: ignore[no-untyped-def]
    """Liger's with Triton, which it leaves on Hopper if it can: no entropy, one reduction for all tokens."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Loss

    kernel = "nvidia-triton"
    Loss.apply(
        hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum", None, False, None, False, False, False, kernel
    )[0].backward()
    return f"liger-kernel {version('liger-kernel')}, {kernel}"


def liger_cute(hidden, weight, labels, trained, factors) -> str:  # type: ignore[no-untyped-def]
    """Liger's for Hopper, in bfloat16: logits are kept for backward."""
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as hopper

    hopper.liger_fused_linear_cross_entropy_sm90(hidden, weight, labels, reduction="sum").backward()
    return f"liger-kernel {version('liger-kernel')}, CuTe for sm_90"


def cut_cross_entropy(hidden, weight, labels, trained, factors) -> str:  # type: ignore[no-untyped-def]
    """Apple's: log-probs of each token, no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    (factors[0] @ -linear_cross_entropy(hidden, weight, labels, reduction="none")).backward()
    return f"cut-cross-entropy {version('cut-cross-entropy')}"


def quack(hidden, weight, labels, trained, factors) -> str:  # type: ignore[no-untyped-def]
    """QuACK's: logits in bfloat16, gradients made in forward, one reduction for all tokens."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, scaled_exp_lce_supported

    is_fused = scaled_exp_lce_supported(hidden, weight, 4096, "sum")
    chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum", use_scaled_exp=is_fused).backward()
    return f"quack-kernels {version('quack-kernels')}, {'fused for sm_90' if is_fused else 'chunked'}"


if __name__ == "__main__":
    main()
