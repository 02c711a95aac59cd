"""Plans over random pairs of layouts: carried out on numbered elements, every server rank ends with what it must hold."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.kinds import boxes, shard_shape
from megatron_rl.convert.tables.table import entries, hf_tensors
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.messages import box
from megatron_rl.weight_sync.plan import Plan, TrainingLayout, make_plan, rounds
from megatron_rl.weight_sync.served import RolloutLayout, served_parameters

DENSE = ModelShape(
    family="qwen3", num_layers=4, hidden_size=16, num_attention_heads=8, num_key_value_heads=4, head_dim=4,
    intermediate_size=24, vocab_size=131, tied=False, norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qkv_bias=False,
    proj_bias=False, mlp_bias=False, qk_norm=True, max_position_embeddings=64, initializer_range=0.02, dtype="float32",
    bos_token_id=None, eos_token_ids=(), pad_token_id=None,
)  # fmt: skip
SHAPES = [
    DENSE,
    dataclasses.replace(DENSE, family="qwen2", qkv_bias=True, qk_norm=False, tied=True),
    dataclasses.replace(DENSE, family="llama", qk_norm=False, num_key_value_heads=2),
    dataclasses.replace(
        DENSE, family="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True
    ),
]


def random_pair(number: int) -> tuple[ModelShape, TrainingLayout, RolloutLayout]:
    """Layouts that both sides accept."""
    draw = random.Random(number)
    while True:
        shape = draw.choice(SHAPES)
        tp, pp, vpp, dp = (draw.choice(sizes) for sizes in ((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 3, 4)))
        ep, etp = (draw.choice((1, 2, 4)), draw.choice((None, 1, 2))) if shape.num_experts else (1, None)
        training = TrainingLayout(tp, pp, dp, vpp if pp > 1 else 1, ep, etp)
        if shape.num_layers % (pp * training.vpp_size) or (tp * dp) % (ep * training.expert_tp_size):
            continue
        if shape.num_key_value_heads % tp:
            continue
        rollout = RolloutLayout(draw.choice((1, 2, 3)), draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 4)))
        try:
            rollout.check(shape)
        except UserError:
            continue
        if shape.num_experts == 0 and rollout.ep_size > 1:
            continue
        return shape, training, rollout


def numbered(shape: ModelShape) -> dict[str, np.ndarray]:
    """Every element of the checkpoint has a number of its own."""
    found, start = {}, 1
    for name, extent in hf_tensors(shape).items():
        count = int(np.prod(extent))
        found[name] = np.arange(start, start + count).reshape(extent)
        start += count
    return found


def shards(shape: ModelShape, training: TrainingLayout) -> dict[int, dict[str, np.ndarray]]:
    """What each trainer rank holds."""
    tensors = numbered(shape)
    held: dict[int, dict[str, np.ndarray]] = {rank: {} for rank in range(training.num_ranks)}
    for entry in entries(shape).values():
        for rank, size, world_ranks in training.holders(entry, shape):
            shard = np.zeros(shard_shape(entry.kind, shape, size), dtype=np.int64)
            for cut in boxes(entry.kind, shape, rank, size):
                shard[cut.shard_slices] = tensors[entry.hf_names[cut.tensor]][cut.hf_slices]
            for world_rank in world_ranks:
                held[world_rank][entry.name] = shard
    return held


def must_hold(shape: ModelShape, layout: RolloutLayout, rank: int) -> dict[str, np.ndarray]:
    """A server rank's parameters, written down from SGLang's layers without any box."""
    tensors, tp = numbered(shape), layout.tp_size
    found: dict[str, np.ndarray] = {}

    def heads(x: np.ndarray, count: int) -> np.ndarray:
        if tp <= count:
            return np.split(x, tp)[rank]
        return np.split(x, count)[rank * count // tp]

    padding = -shape.vocab_size % 64
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            found[name] = np.split(np.pad(tensors[name], ((0, padding), (0, 0))), tp)[rank]
    found["model.norm.weight"] = tensors["model.norm.weight"]
    for layer in range(shape.num_layers):
        at, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for what in ("weight", "bias"):
            if f"{at}q_proj.{what}" in tensors:
                q, k, v = (tensors[f"{at}{x}_proj.{what}"] for x in "qkv")
                kv = shape.num_key_value_heads
                found[f"{at}qkv_proj.{what}"] = np.concatenate([np.split(q, tp)[rank], heads(k, kv), heads(v, kv)])
        found[f"{at}o_proj.weight"] = np.split(tensors[f"{at}o_proj.weight"], tp, axis=1)[rank]
        for name in (f"{at}q_norm.weight", f"{at}k_norm.weight", f"{mlp}gate.weight"):
            if name in tensors:
                found[name] = tensors[name]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = tensors[f"model.layers.{layer}.{name}.weight"]
        if not shape.num_experts:
            halves = [np.split(tensors[f"{mlp}{x}_proj.weight"], tp)[rank] for x in ("gate", "up")]
            found[f"{mlp}gate_up_proj.weight"] = np.concatenate(halves)
            found[f"{mlp}down_proj.weight"] = np.split(tensors[f"{mlp}down_proj.weight"], tp, axis=1)[rank]
            continue
        cut = tp // layout.ep_size
        mine = np.split(np.arange(shape.num_experts), layout.ep_size)[rank // cut]
        w13, w2 = [], []
        for expert in mine:
            gate, up, down = (tensors[f"{mlp}experts.{expert}.{x}_proj.weight"] for x in ("gate", "up", "down"))
            w13.append(np.concatenate([np.split(gate, cut)[rank % cut], np.split(up, cut)[rank % cut]]))
            w2.append(np.split(down, cut, axis=1)[rank % cut])
        found[f"{mlp}experts.w13_weight"], found[f"{mlp}experts.w2_weight"] = np.stack(w13), np.stack(w2)
    return found


def carry_out(plan: Plan, shape: ModelShape, training: TrainingLayout, rollout: RolloutLayout) -> list[dict]:
    held = shards(shape, training)
    servers = [
        {p.name: np.zeros(p.shape, dtype=np.int64) for p in served_parameters(shape, rollout, rank % rollout.tp_size)}
        for rank in range(rollout.num_ranks)
    ]
    for copy in plan.copies:
        overlap = copy.overlap
        source = held[copy.sender][overlap.source][box(overlap.source_start, overlap.size)]
        target = servers[copy.receiver][overlap.target]
        place = box(overlap.target_start, overlap.size)
        assert not target[place].any(), "written twice"
        target[place] = source
    return servers


@pytest.mark.slow
@pytest.mark.parametrize("hundred", [0, 1, 2])
def test_every_rank_ends_with_what_it_must_hold(hundred: int) -> None:
    kinds: Counter[tuple[bool, bool]] = Counter()
    for number in range(100 * hundred, 100 * hundred + 100):
        shape, training, rollout = random_pair(number)
        plan = make_plan(shape, training, rollout)
        assert plan.received_ratio == 1.0
        for receiver, got in enumerate(carry_out(plan, shape, training, rollout)):
            wanted = must_hold(shape, rollout, receiver % rollout.tp_size)
            assert got.keys() == wanted.keys()
            for name in wanted:
                assert np.array_equal(got[name], wanted[name]), (number, name)
        kinds[shape.num_experts > 0, rollout.tp_size > shape.num_key_value_heads] += 1
    assert all(kinds[key] >= 5 for key in ((False, False), (False, True), (True, False))), kinds


def test_load_is_shared_by_those_that_hold_the_same() -> None:
    shape = dataclasses.replace(DENSE, vocab_size=512)  # so that no rank has mostly padding
    plan = make_plan(shape, TrainingLayout(tp_size=2, pp_size=2, dp_size=2), RolloutLayout(num_servers=2, tp_size=2))
    assert set(plan.sent) == set(range(8))
    of_stage = [sum(plan.sent[rank] for rank in range(first, first + 4)) for first in (0, 4)]
    for stage, first in enumerate((0, 4)):
        assert max(plan.sent[rank] for rank in range(first, first + 4)) < 1.1 * of_stage[stage] / 4


def test_nobody_talks_to_two_at_once() -> None:
    plan = make_plan(DENSE, TrainingLayout(tp_size=2, dp_size=2), RolloutLayout(num_servers=2, tp_size=2))
    all_rounds = list(rounds(plan))
    assert sum(map(len, all_rounds)) == len(plan.copies)
    for copies in all_rounds:
        pairs = {(copy.sender, copy.receiver) for copy in copies}
        assert len({sender for sender, _ in pairs}) == len({receiver for _, receiver in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("layout", "field"),
    [
        (RolloutLayout(tp_size=3), "rollout.sglang_cfg.tp_size"),
        (RolloutLayout(tp_size=4, ep_size=3), "rollout.sglang_cfg.ep_size"),
        (RolloutLayout(tp_size=16), "rollout.sglang_cfg.tp_size"),
    ],
)
def test_what_sglang_could_not_serve_is_refused(layout: RolloutLayout, field: str) -> None:
    with pytest.raises(UserError, match=field):
        make_plan(SHAPES[-1], TrainingLayout(), layout)
