"""Weights in and out of a running model, through the weight table of its family."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.convert.architecture.shape import Dtype, ModelShape
from megatron_rl.convert.hf.checkpoint_view import CheckpointView, exported_config
from megatron_rl.convert.hf.export import merge_parameter
from megatron_rl.convert.hf.load import check_coverage, load_parameter
from megatron_rl.convert.hf.random_weights import RandomReader
from megatron_rl.convert.hf.reader import HFReader, TensorReader
from megatron_rl.convert.hf.writer import LayoutWriter, check_source, dtype_fields
from megatron_rl.convert.tables.kinds import shard_shape
from megatron_rl.convert.tables.table import (
    entries,
    find_entry,
    float32_tensors,
    global_name,
    hf_tensors,
    names_of_all_experts,
    plain_name,
)
from megatron_rl.files import SAME_COMMAND, disk_error, publish_folder
from megatron_rl.metrics import progress
from megatron_rl.model.forward import PolicyModel
from megatron_rl.parallel.agree import all_ranks_agree, gather_json
from megatron_rl.parallel.groups import Groups

logger = logging.getLogger(__name__)


def named_parameters(chunks: Sequence[PolicyModel], shape: ModelShape, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's weights under their global Megatron names (layers and experts counted over the whole model).

    These are the parameters, and those buffers that a checkpoint holds, such as a router's bias.
    """
    known = entries(shape)
    first_expert = groups.ep_rank * (shape.num_experts // groups.ep_size)
    for chunk in chunks:
        layers = chunk.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        for name, tensor in chain(chunk.named_parameters(), chunk.named_buffers()):
            name = global_name(name, first_layer, first_expert)
            if isinstance(tensor, torch.nn.Parameter) or plain_name(name) in known:
                yield name, tensor


def load_hf_weights(
    chunks: Sequence[PolicyModel], shape: ModelShape, groups: Groups, open_reader: Callable[[], TensorReader]
) -> None:
    """Fill this rank's part of the model; each rank reads only its slices. What a checkpoint has beyond the model, and is left
    out on purpose, is said in one line.

    Args:
        chunks: this rank's part of the model.
        shape: of the whole model.
        groups: process groups.
        open_reader: opens the checkpoint (or what stands for one); its errors are raised on all ranks alike.

    Raises:
        UserError: on all ranks, before anything is filled, where files and config.json do not fit together.
    """
    with all_ranks_agree(groups.cpu_group):
        reader = open_reader()
        if isinstance(reader, HFReader):
            reader = CheckpointView(reader, shape)
            if reader.dropped and groups.rank == 0:
                logger.warning(reader.summary())
        check_coverage(shape, reader, tp_size=groups.tp_size)
    with torch.no_grad(), all_ranks_agree(groups.cpu_group):
        for name, parameter in progress(list(named_parameters(chunks, shape, groups)), "loading weights"):
            is_expert = find_entry(name, shape).expert is not None
            rank, size = (groups.etp_rank, groups.etp_size) if is_expert else (groups.tp_rank, groups.tp_size)
            load_parameter(name, reader, shape, rank, size, out=parameter.data)


def iterate_hf_tensors(
    chunks: Sequence[PolicyModel], shape: ModelShape, groups: Groups
) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor, whole, on every rank. A collective: consume it to the end.

    Yields:
        (Hugging Face name, tensor in the model's dtype, or float32 where the table says so, on the model's device).
    """
    mine = dict(named_parameters(chunks, shape, groups))
    speaks = groups.tp_rank == 0 and dist.get_rank(groups.dp_cp_group) == 0  # one rank of each stage
    told = gather_json([groups.pp_rank, list(mine)] if speaks else None, groups.cpu_group)
    held = [names for _, names in sorted(each for each in told if each is not None)]
    per_rank = max(1, shape.num_experts // groups.ep_size)
    for stage, names in enumerate(held):
        # Of each expert parameter a rank knows its own experts' alone; the same order on every rank.
        for name in dict.fromkeys(each for known in names for each in names_of_all_experts(known, shape)):
            entry = find_entry(name, shape)
            if entry.is_copy:  # the last stage's copy of tied embeddings is the first stage's tensor
                continue
            is_expert = entry.expert is not None
            group = groups.etp_group if is_expert else groups.tp_group
            size = shard_shape(entry.kind, shape, dist.get_world_size(group))
            shard = mine.get(name)
            if shard is None:
                dtype = torch.float32 if entry.is_float32 else chunks[0].config.params_dtype
                shard = torch.empty(size, dtype=dtype, device=groups.device)
            shard = shard.detach().contiguous()
            if entry.expert is not None and groups.pp_rank == stage:
                _broadcast(shard, entry.expert // per_rank, groups.ep_group)
            _broadcast(shard, stage, groups.pp_group)
            yield from merge_parameter(name, _all_shards(shard, group), shape).items()


def start_weights(config: Config, shape: ModelShape, groups: Groups) -> Callable[[Sequence[PolicyModel]], None]:
    """Return the function that fills a model with the weights that a run starts from: random ones, or of its checkpoint."""
    policy, seed = config.policy, config.trainer.seed

    def reader() -> HFReader | RandomReader:
        is_random = policy.initialization == "random"
        return RandomReader(shape, seed=seed) if is_random else HFReader(policy.model_dir)

    return lambda chunks: load_hf_weights(chunks, shape, groups, reader)


def export_hf(chunks: Sequence[PolicyModel], shape: ModelShape, groups: Groups, *, source: Path, target: Path) -> None:
    """Write a Hugging Face checkpoint of the current weights. A collective; rank 0 writes.

    Args:
        chunks: this rank's part of the model.
        shape: of the whole model.
        groups: process groups.
        source: directory whose config and tokenizer files are carried over.
        target: directory to write; an older export there is replaced.
    """
    fresh = target.with_name(target.name + ".new")
    writer: LayoutWriter | None = None
    with all_ranks_agree(groups.cpu_group):
        if groups.rank == 0:
            shutil.rmtree(fresh, ignore_errors=True)
            writer = _open_writer(fresh, shape, chunks[0].config.params_dtype, source)
    failure: OSError | None = None  # the other ranks still need this one in the coming collectives
    for name, tensor in progress(iterate_hf_tensors(chunks, shape, groups), "writing weights"):
        try:
            if writer is not None and failure is None:
                writer.add(name, tensor)
        except OSError as error:
            failure = error
    with all_ranks_agree(groups.cpu_group):
        if writer is not None:
            _finish_export(writer, failure, fresh, target)


def _open_writer(directory: Path, shape: ModelShape, dtype: torch.dtype, source: Path) -> LayoutWriter:
    check_source(source)
    in_float32 = float32_tensors(shape)
    layout = {
        name: (extent, torch.float32 if name in in_float32 else dtype) for name, extent in hf_tensors(shape).items()
    }
    writer = LayoutWriter(directory, layout, source=source)
    given = json.loads((source / "config.json").read_text(encoding="utf-8"))
    fields = exported_config(given | dtype_fields(given, _dtype_name(dtype)))
    writer.add_file("config.json", json.dumps(fields, indent=2) + "\n")
    return writer


def _finish_export(writer: LayoutWriter, failure: OSError | None, fresh: Path, target: Path) -> None:
    try:
        if failure is None:
            writer.finish()
            publish_folder(fresh, target, replaces=True)
    except OSError as error:
        failure = error
    if failure is not None:
        writer.abort()
        fix = f"{SAME_COMMAND}; the training checkpoint is intact"
        raise disk_error(target, failure, field="exp_manager.exp_dir", fix=fix) from failure


def _dtype_name(dtype: torch.dtype) -> Dtype:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _broadcast(shard: Tensor, owner: int, group: dist.ProcessGroup) -> None:
    """Send a shard from the group's rank ``owner`` to its other ranks."""
    if dist.get_world_size(group) > 1:
        dist.broadcast(shard, dist.get_global_rank(group, owner), group=group)


def _all_shards(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    size = dist.get_world_size(group)
    if size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(size)]
    dist.all_gather(shards, shard, group=group)
    return shards
