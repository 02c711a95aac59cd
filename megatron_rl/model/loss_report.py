"""The numbers that a loss reports: per micro-batch on each rank, then over the whole mini-batch on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.losses.terms import TokenTerms
from megatron_rl.parallel.agree import gather_json
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import MicroBatch, RowKind


def report(terms: TokenTerms, batch: MicroBatch, num_tokens: Mapping[RowKind, int], loss: Tensor) -> dict[str, Any]:
    """Return this micro-batch's share of each mean over the mini-batch, and its maxima.

    Args:
        terms: of the loss; its means and maxima are taken over loss tokens, of the kinds it names for each.
        batch: the micro-batch.
        num_tokens: loss tokens of each kind in the whole mini-batch.
        loss: scalar, this micro-batch's share of the loss.
    """
    present = frozenset(num_tokens)
    masks: dict[frozenset[RowKind], Tensor] = {present: batch.loss_mask}

    def tokens_of(name: str) -> tuple[Tensor, int]:
        kinds = present & terms.kinds.get(name, present)
        if kinds not in masks:
            chosen = torch.tensor(sorted(map(int, kinds)), device=batch.kind.device, dtype=batch.kind.dtype)
            masks[kinds] = batch.loss_mask & torch.isin(batch.kind, chosen)
        return masks[kinds], sum(num_tokens[kind] for kind in kinds)

    sums, maxima = {"loss": loss.detach().double()}, {}
    for name, value in terms.means.items():
        mask, count = tokens_of(name)
        if count:  # a mean over no token is no number
            sums[name] = value.detach()[mask].double().sum() / count
    for name, value in terms.maxima.items():
        mask, count = tokens_of(name)
        if count:
            # Not value[mask].max(): a micro-batch without such tokens has no maximum, but the ranks go on together.
            maxima[name] = value.detach().double().masked_fill(~mask, -math.inf).max()
    return {"sums": sums, "maxima": maxima}


def reduce_reports(outputs: Sequence[Mapping[str, Any]], groups: Groups) -> dict[str, float]:
    """Add up the sums, in float64, and take the largest maxima of all micro-batches of all data-parallel ranks.

    Args:
        outputs: each with a report's ``sums`` and ``maxima``; empty on ranks that are not of the last pipeline stage.
        groups: process groups.
    """
    sums: dict[str, Tensor] = {}
    maxima: dict[str, Tensor] = {}
    for output in outputs:
        for key, value in output["sums"].items():
            sums[key] = sums.get(key, 0.0) + value
        for key, value in output["maxima"].items():
            maxima[key] = torch.maximum(maxima[key], value) if key in maxima else value
    is_owner = groups.is_last_stage and groups.tp_rank == 0
    mine = ([float(v) for v in sums.values()], [float(v) for v in maxima.values()]) if is_owner else None
    gathered = gather_json([mine, list(sums), list(maxima)], groups.cpu_group)
    reports = [values for values, _, _ in gathered if values is not None]
    sum_keys, max_keys = next((s, m) for values, s, m in gathered if values is not None)
    totals = dict(zip(sum_keys, map(math.fsum, zip(*(r[0] for r in reports)))))
    return totals | dict(zip(max_keys, map(max, zip(*(r[1] for r in reports)))))
