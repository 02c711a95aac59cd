"""Weight-sync plans of large models: how long they take, how many messages they have, and that nothing is sent in vain.

colocated, on machines of 8 GPUs:
    Qwen2.5-32B        TP8 x PP2 x DP2 -> 4 servers of TP8, and 256 GPUs: TP8 x PP2 x DP16 -> 32 servers of TP8
    Qwen3-30B-A3B      DP32, experts over 8 ranks -> 8 servers of TP4
apart:
    Qwen2.5-32B        TP8 x PP4 x DP2 -> 8 servers of TP4
    Qwen3-235B-A22B    TP4 x PP2 x DP8, experts over 16 ranks -> 4 servers of TP8, experts over 8 ranks

received_ratio_max    bytes received over bytes held by the servers, the worst of all: 1.0 is the least possible
balance_max           the busiest sender's load over the mean, within the pipeline stage that is worst at it
messages_32b, messages_30b    of 32B on 256 GPUs, of 30B-A3B on 32
partners_max          most trainer ranks that one server rank gets something from
seconds               that one rank plans for, its own pieces included, of the slowest plan
"""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections import defaultdict

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.doctor.weight_traffic import traffic_of
from megatron_rl.weight_sync.buckets import buckets_of
from megatron_rl.weight_sync.pieces import ServedForm, TrainingLayout
from megatron_rl.weight_sync.places import Places
from megatron_rl.weight_sync.plan import Plan, between_nodes, make_plan
from megatron_rl.weight_sync.served import RolloutLayout

BUCKET_BYTES = 2**29
"""The default of weight_sync.bucket_bytes."""
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
QWEN3_30B = dataclasses.replace(
    QWEN3_235B,
    num_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    intermediate_size=6144,
    moe_intermediate_size=768,
)
LARGE, EXPERTS = "Qwen2.5-32B, 256 GPUs", "Qwen3-30B-A3B, 32 GPUs"
CASES = {
    "Qwen2.5-32B, 32 GPUs": (QWEN25_32B, TrainingLayout(8, 2, 2), RolloutLayout(4, 8), True),
    LARGE: (QWEN25_32B, TrainingLayout(8, 2, 16), RolloutLayout(32, 8), True),
    EXPERTS: (QWEN3_30B, TrainingLayout(dp_size=32, ep_size=8), RolloutLayout(8, 4), True),
    "Qwen2.5-32B, apart": (QWEN25_32B, TrainingLayout(8, 4, 2), RolloutLayout(8, 4), False),
    "Qwen3-235B-A22B, apart": (
        QWEN3_235B,
        TrainingLayout(tp_size=4, pp_size=2, dp_size=8, ep_size=16, etp_size=1),
        RolloutLayout(num_servers=4, tp_size=8, ep_size=8),
        False,
    ),
}


def main() -> None:
    """Make all plans, print a table, and a line of JSON last."""
    seconds, ratios, balances, messages, partners = [], [], [], {}, []
    for name, (shape, training, rollout, is_colocated) in CASES.items():
        ranks, receivers = training.num_ranks, rollout.num_ranks
        places = Places.shared(ranks, receivers, per_node=8) if is_colocated else Places.apart(ranks, receivers)
        started = time.perf_counter()
        plan = make_plan(shape, training, rollout, places, ServedForm("bfloat16"), bucket_bytes=BUCKET_BYTES)
        busiest = max(plan.sent(), key=plan.sent().__getitem__)
        for stream in plan.streams:
            if stream.sender == busiest:
                list(buckets_of(stream))
        seconds.append(time.perf_counter() - started)
        received, traffic = plan.received(), traffic_of(plan)
        ratios.append(sum(received.values()) / plan.held)
        balances.append(_balance(plan, training))
        messages[name] = traffic.num_messages
        partners.append(traffic.most_partners)
        between, held = between_nodes(plan.streams, plan.places) * 1e-9, plan.held * 1e-9
        print(
            f"{name:24} {plan.num_pieces:7,} pieces, {traffic.num_messages:7,} messages (most {traffic.most_messages} to one), "
            f"partners {traffic.most_partners}, {between:.1f} of {held:.1f} GB between machines, "
            f"received {ratios[-1]:.3f}, balance {balances[-1]:.3f}, {seconds[-1]:.2f} s"
        )
    figures = {
        "received_ratio_max": max(ratios),
        "balance_max": max(balances),
        "messages_32b": messages[LARGE],
        "messages_30b": messages[EXPERTS],
        "partners_max": max(partners),
        "seconds": max(seconds),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


def _balance(plan: Plan, training: TrainingLayout) -> float:
    stages: dict[int, list[int]] = defaultdict(list)
    sent = plan.sent()
    for rank in range(training.num_ranks):
        stages[rank // training.ranks_per_stage].append(sent.get(rank, 0))
    return max(max(loads) * len(loads) / sum(loads) for loads in stages.values())


if __name__ == "__main__":
    main()
