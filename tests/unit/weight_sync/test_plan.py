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
from megatron_rl.weight_sync.buckets import box, buckets_of
from megatron_rl.weight_sync.pieces import ServedForm, TrainingLayout
from megatron_rl.weight_sync.places import GpuPlace, Places
from megatron_rl.weight_sync.plan import Plan, between_nodes, make_plan
from megatron_rl.weight_sync.served import RolloutLayout, served_parameters

DENSE = ModelShape(
    family="qwen3", num_layers=4, hidden_size=16, num_attention_heads=8, num_key_value_heads=4, head_dim=4,
    intermediate_size=24, vocab_size=131, tied=False, norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qkv_bias=False,
    proj_bias=False, mlp_bias=False, qk_norm=True, max_position_embeddings=64, initializer_range=0.02, dtype="float32",
    bos_token_id=None, eos_token_ids=(), pad_token_id=None,
)  # fmt: skip
PLAIN = ServedForm("float32")
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


def random_places(number: int, training: TrainingLayout, rollout: RolloutLayout) -> Places:
    """Some ranks on machines of both, some alone; GPUs shared or not."""
    draw = random.Random(number)
    num_nodes = draw.choice((1, 2, 3))
    per_node = -(-training.num_ranks // num_nodes)
    trainer = tuple(GpuPlace(rank // per_node, rank % per_node) for rank in range(training.num_ranks))
    kind = draw.choice(("same order", "any node", "elsewhere"))

    def place(receiver: int) -> GpuPlace:
        if kind == "elsewhere":
            return GpuPlace(num_nodes + receiver // rollout.tp_size)
        node = receiver * num_nodes // rollout.num_ranks if kind == "same order" else draw.randrange(num_nodes + 1)
        return GpuPlace(node, draw.choice((None, draw.randrange(per_node))))

    return Places(trainer, tuple(map(place, range(rollout.num_ranks))))


def shards(shape: ModelShape, training: TrainingLayout) -> dict[int, dict[str, np.ndarray]]:
    """What each trainer rank holds."""
    tensors = numbered(shape)
    held: dict[int, dict[str, np.ndarray]] = {rank: {} for rank in range(training.num_ranks)}
    for entry in entries(shape).values():
        if entry.is_copy:  # of a tied embedding, in the last stage; the first one's is sent
            continue
        if entry.name.startswith("decoder.layers."):
            stage = training.stage_of_layer(int(entry.name.split(".")[2]), shape.num_layers)
        else:
            stage = 0 if entry.name.startswith("embedding.") else training.pp_size - 1
        for rank, size, ranks in training.shards(entry, shape):
            shard = np.zeros(shard_shape(entry.kind, shape, size), dtype=np.int64)
            for cut in boxes(entry.kind, shape, rank, size):
                shard[cut.shard_slices] = tensors[entry.hf_names[cut.tensor]][cut.hf_slices]
            for of_stage in ranks:
                held[stage * training.ranks_per_stage + of_stage][entry.name] = shard
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
    for stream in plan.streams:
        for bucket in buckets_of(stream):
            assert bucket.num_bytes <= stream.bucket_bytes or len(bucket.placed) == 1
            for each in bucket.placed:
                piece = each.piece
                source = held[each.carried.origin][piece.source][box(piece.start, piece.size)]
                for taker in each.carried.takers:
                    (target,) = [t for t in piece.targets if t.tp_rank == taker % rollout.tp_size]
                    place = box(target.start, piece.size)
                    assert not servers[taker][target.name][place].any(), "written twice"
                    servers[taker][target.name][place] = source
    return servers


def least_between_nodes(plan: Plan, shape: ModelShape, training: TrainingLayout, rollout: RolloutLayout) -> int:
    """Elements that each machine's servers need and none of its ranks holds, each counted once a machine; for server ranks on
    machines without a trainer, all that they hold."""
    held, total = shards(shape, training), 0
    for node in {place.node for place in plan.places.servers}:
        near = [rank for rank, place in enumerate(plan.places.trainer) if place.node == node]
        needed: set[int] = set()
        for receiver, place in enumerate(plan.places.servers):
            if place.node == node:
                mine = must_hold(shape, rollout, receiver % rollout.tp_size).values()
                numbers = {int(n) for array in mine for n in array.flat if n}
                total += 0 if near else len(numbers)
                needed |= numbers
        if near:
            total += len(needed - {int(n) for rank in near for array in held[rank].values() for n in array.flat})
    return total


@pytest.mark.slow
@pytest.mark.parametrize("hundred", [0, 1, 2])
def test_every_rank_ends_with_what_it_must_hold(hundred: int) -> None:
    kinds: Counter[tuple[bool, bool]] = Counter()
    for number in range(100 * hundred, 100 * hundred + 100):
        shape, training, rollout = random_pair(number)
        places = random_places(number, training, rollout)
        plan = make_plan(
            shape, training, rollout, places, PLAIN, bucket_bytes=random.Random(number).choice((160, 2000, 4 * 10**6))
        )
        assert sum(plan.received().values()) == plan.held
        assert between_nodes(plan.streams, plan.places) == 4 * least_between_nodes(plan, shape, training, rollout)
        for receiver, got in enumerate(carry_out(plan, shape, training, rollout)):
            wanted = must_hold(shape, rollout, receiver % rollout.tp_size)
            assert got.keys() == wanted.keys()
            for name in wanted:
                assert np.array_equal(got[name], wanted[name]), (number, name)
        kinds[shape.num_experts > 0, rollout.tp_size > shape.num_key_value_heads] += 1
    assert all(kinds[key] >= 5 for key in ((False, False), (False, True), (True, False))), kinds


def test_load_is_shared_by_those_that_hold_the_same() -> None:
    shape = dataclasses.replace(DENSE, vocab_size=512)  # so that no rank has mostly padding
    training, rollout = TrainingLayout(tp_size=2, pp_size=2, dp_size=2), RolloutLayout(num_servers=2, tp_size=2)
    sent = make_plan(shape, training, rollout, Places.apart(8, 4), PLAIN, bucket_bytes=4 * 10**6).sent()
    assert set(sent) == set(range(8))
    for first in (0, 4):
        of_stage = [sent[rank] for rank in range(first, first + 4)]
        assert max(of_stage) < 1.1 * sum(of_stage) / 4


def test_the_nearest_holder_is_asked() -> None:
    places = Places.shared(8, 8, per_node=4)
    plan = make_plan(
        DENSE, TrainingLayout(dp_size=8), RolloutLayout(num_servers=8), places, PLAIN, bucket_bytes=4 * 10**6
    )
    assert {(stream.sender, *stream.receivers) for stream in plan.streams} == {(rank, rank) for rank in range(8)}
    assert all(stream.is_local for stream in plan.streams) and between_nodes(plan.streams, plan.places) == 0


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
        make_plan(SHAPES[-1], TrainingLayout(), layout, Places.apart(1, layout.num_ranks), PLAIN, bucket_bytes=400)
