"""Weight-sync plans of large models, on one core: how long they take, and that nothing is sent in vain.

Qwen2.5-32B        TP8 x PP4 x DP2 -> 8 servers of TP4
Qwen3-235B-A22B    TP4 x PP2 x DP8, experts over 16 ranks -> 4 servers of TP8, experts over 8 ranks

received_ratio_max    bytes received over bytes held by the servers, the worse of both: 1.0 is the least possible
balance_max           the busiest sender's load over the mean, within the pipeline stage that is worst at it
seconds, peak_gb      of the slower plan; of the whole process
"""

from __future__ import annotations

import json
import resource
import time
from collections import defaultdict

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.weight_sync.plan import TrainingLayout, make_plan
from megatron_rl.weight_sync.served import RolloutLayout

_COMMON = {
    "tied": False, "norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "proj_bias": False, "mlp_bias": False,
    "max_position_embeddings": 32768, "initializer_range": 0.02, "dtype": "bfloat16", "bos_token_id": None,
    "eos_token_ids": (), "pad_token_id": None,
}  # fmt: skip
QWEN25_32B = ModelShape(
    family="qwen2", num_layers=64, hidden_size=5120, num_attention_heads=40, num_key_value_heads=8, head_dim=128,
    intermediate_size=27648, vocab_size=152064, qkv_bias=True, qk_norm=False, **_COMMON,
)  # fmt: skip
QWEN3_235B = ModelShape(
    family="qwen3_moe", num_layers=94, hidden_size=4096, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
    intermediate_size=12288, vocab_size=151936, qkv_bias=False, qk_norm=True, num_experts=128, num_experts_per_tok=8,
    moe_intermediate_size=1536, norm_topk_prob=True, **_COMMON,
)  # fmt: skip
CASES = {
    "Qwen2.5-32B": (
        QWEN25_32B,
        TrainingLayout(tp_size=8, pp_size=4, dp_size=2),
        RolloutLayout(num_servers=8, tp_size=4),
    ),
    "Qwen3-235B-A22B": (
        QWEN3_235B,
        TrainingLayout(tp_size=4, pp_size=2, dp_size=8, ep_size=16, etp_size=1),
        RolloutLayout(num_servers=4, tp_size=8, ep_size=8),
    ),
}


def main() -> None:
    """Make both plans, print a table, and a line of JSON last."""
    rows = []
    for name, (shape, training, rollout) in CASES.items():
        started = time.perf_counter()
        plan = make_plan(shape, training, rollout)
        seconds = time.perf_counter() - started
        stages: dict[int, list[int]] = defaultdict(list)
        per_stage = training.num_ranks // training.pp_size
        for rank in range(training.num_ranks):
            stages[rank // per_stage].append(plan.sent.get(rank, 0))
        balance = max(max(loads) * len(loads) / sum(loads) for loads in stages.values())
        rows.append((plan.received_ratio, balance, seconds))
        print(
            f"{name:16} {training.num_ranks:4} -> {rollout.num_ranks:3} ranks: {len(plan.copies):8,} copies, "
            f"received {plan.received_ratio:.3f}, balance {balance:.3f}, {seconds:.1f} s"
        )
    ratio, balance, seconds = (max(column) for column in zip(*rows))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    figures = {"received_ratio_max": ratio, "balance_max": balance, "seconds": seconds, "peak_gb": peak}
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
