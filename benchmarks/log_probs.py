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
On a GPU, where seconds are the least of three, it also measures Liger's fused loss and Apple's cut cross-entropy (no entropy
there), and ``matmul_share``: the rate of ours over that of a plain product. ``skipped`` says which of the others is not
installed, or what it failed with. Figures are printed as soon as they are known, in a line of JSON that holds all so far.
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
from collections.abc import Callable

from megatron_rl.process.lifetime import leave

HIDDEN, VOCABULARY = 1024, 151_936
_PAIR = {"peak_memory": "gigabytes", "time": "seconds"}


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

    def run(path: str, tokens: int = arguments.tokens, **how: object) -> dict[str, float]:
        sizes = {"hidden_size": arguments.hidden, "vocabulary": arguments.vocabulary}
        found = in_process(path=path, tokens=tokens, dtype=arguments.dtype, **sizes, **how)
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
    figures: dict[str, float] = {}
    skipped: dict[str, str] = {}

    def summary() -> str:
        rounded = {name: round(value, 3) for name, value in figures.items()}
        return json.dumps({"dtype": arguments.dtype} | rounded | ({"skipped": skipped} if skipped else {}))

    def set_against(other: str, **names: str) -> None:
        """Add ours over another's seconds and gigabytes, under these names; on a GPU, whatever the other's fate."""
        try:
            found = run(other, **all_rows)
            figures.update({names[of]: ours_all[of] / found[of] for of in names})
        except RuntimeError as error:
            if not on_gpu():
                raise
            skipped[other] = str(error)
        print(summary(), flush=True)

    ours_all = run("ours", **all_rows)
    if on_gpu():
        # Of each trained token: logits, once more for backward, and both gradients.
        operations = 4 * 2 * arguments.tokens * arguments.hidden * arguments.vocabulary
        figures["matmul_share"] = operations / ours_all["seconds"] / matmul_flops()
        print(summary(), flush=True)
    set_against("naive", seconds="time_ratio_without_prompt", gigabytes="peak_memory_ratio_without_prompt")
    set_against("chunked", seconds="time_vs_chunked")
    if on_gpu():
        for other in ("liger", "cut_cross_entropy"):
            set_against(other, seconds=f"time_vs_{other}", gigabytes=f"peak_memory_vs_{other}")
    naive, ours, _ = pair()
    figures |= {f"{what}_ratio": ours[key] / naive[key] for what, key in _PAIR.items()}
    if not on_gpu():  # NCCL wants a GPU for each rank
        figures["time_tp2_vs_tp1"] = run("ours", ranks=2, **half)["seconds"] / ours["seconds"]
    print(summary(), flush=True)
    table = {tokens: run("ours", tokens, **half) for tokens in (2048, 8192, 32768)}
    print("\n| tokens | seconds | GB above inputs |\n| --- | --- | --- |")
    for tokens, found in table.items():
        print(f"| {tokens} | {found['seconds']:.3f} | {found['gigabytes']:.2f} |")
    sizes = {name: [round(found[name], 3) for found in table.values()] for name in ("seconds", "gigabytes")}
    print(json.dumps(json.loads(summary()) | sizes))


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
    """The slowest rank's seconds and the largest rank's memory.

    Raises:
        RuntimeError: with what a rank failed with.
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
        outputs = [process.communicate()[0] for process in processes]
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
) -> dict[str, float]:
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

    work: Callable[..., None] = {
        "naive": naive, "chunked": chunked, "ours": ours, "liger": liger, "cut_cross_entropy": cut_cross_entropy,
    }[path]  # fmt: skip
    if device == "cuda":  # compilation and library set-up are not what is measured
        work(hidden, weight, labels, trained, factors)
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
    before, seconds = peak(), []
    for _ in range(3 if device == "cuda" else 1):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        work(hidden, weight, labels, trained, factors)
        after = peak()
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group()
    return {"seconds": min(seconds), "gigabytes": after - before}


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


def ours(hidden, weight, labels, trained, factors) -> None:  # type: ignore[no-untyped-def]
    """As PolicyModel calls it."""
    import torch
    import torch.distributed as dist

    from megatron_rl.parallel.vocab import vocab_parallel_statistics

    main_grad = torch.zeros(weight.shape, device=weight.device)
    rows = trained.nonzero()[:, 0]
    group = dist.group.WORLD
    assert group is not None
    found = vocab_parallel_statistics(
        hidden[rows], weight, labels[rows],
        vocab_size=weight.shape[0] * dist.get_world_size(), temperature=1.0, tp_group=group, main_grad=main_grad,
    )  # fmt: skip
    (factors[0, rows] @ found.log_probs + factors[1, rows] @ found.entropy).backward()


def liger(hidden, weight, labels, trained, factors) -> None:  # type: ignore[no-untyped-def]
    """Liger's fused linear cross entropy: no entropy, one reduction for all tokens."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels).backward()


def cut_cross_entropy(hidden, weight, labels, trained, factors) -> None:  # type: ignore[no-untyped-def]
    """Apple's: log-probs of each token, no entropy; the weight's gradient in its own type."""
    from cut_cross_entropy import linear_cross_entropy

    (factors[0] @ -linear_cross_entropy(hidden, weight, labels, reduction="none")).backward()


if __name__ == "__main__":
    main()
