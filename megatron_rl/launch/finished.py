"""Tell a folder that holds this run, finished, from others: then there is nothing to do.

A finished run keeps in ``summary.json`` the settings that its result depends on, and digests of the files that it read. A start
with others is another run, and is refused: it would neither do what it asks for nor may it write over what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.config import Config, shown
from megatron_rl.config.data import validation_key
from megatron_rl.config.files import stored_pools
from megatron_rl.errors import UserError, shortened
from megatron_rl.files import content_digest
from megatron_rl.launch.folder import SUMMARY
from megatron_rl.launch.rank import Runtime
from megatron_rl.metrics.rows import json_safe
from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json
from megatron_rl.plugins import file_digest
from megatron_rl.tasks.rows.content import rows_digest

_NO_MATTER = (
    "exp_manager", "presample", "policy.ddp_cfg", "policy.train_micro_batch_tokens", "rollout.servers", "rollout.sglang_cfg",
    "rollout.max_batch_size", "rollout.record", "data.num_scoring_workers", "data.scoring_timeout_s",
    *(f"weight_sync.{name}" for name in ("transport", "directory", "full_every", "pause_mode", "bucket_bytes", "timeout_s")),
    *(f"trainer.{name}" for name in (
        "accelerator", "devices", "num_nodes", "threads_per_rank", "max_steps", "max_generated_tokens", "timeout_s",
        "hang_timeout_s", "offload_during_rollouts", "check_memory", "numerics",
    )),
)  # fmt: skip
"""Fields and sections on which no result depends but for rounding, or whose amount the summary has (steps, tokens)."""
_LAYOUT = (
    "parallel", "pipeline", "recompute", "offload", "overlap", "fusion", "comm", "dispatcher", "gemm", "impl", "backend",
    "graph",
)  # fmt: skip
"""Words in the names of Megatron's fields that say how something is computed, not what."""
_MEGATRON = ("policy.megatron_cfg", "policy.optim.optimizer_cfg")
_MAX_NAMED = 3


def is_finished(config: Config, runtime: Runtime) -> bool:
    """Return whether the run in this folder has done all that the config asks for, after saying so. A collective.

    Raises:
        UserError: on all ranks: a run with other settings has.
    """
    assert dist.group.WORLD is not None
    steps = None
    with all_ranks_agree(dist.group.WORLD):
        if runtime.rank == 0:
            steps = finished_steps(config)
    if steps is not None:
        line = f"{config.exp_manager.run_dir} holds this run, finished after {steps} steps: nothing to do"
        print(f"{line} (a higher trainer.max_steps continues it)", flush=True)
    return broadcast_json(steps, dist.group.WORLD) is not None


def finished_steps(config: Config) -> int | None:
    """Return after how many steps this run has finished; None: it has not.

    Raises:
        UserError: a run with other settings has.
    """
    manager, trainer = config.exp_manager, config.trainer
    try:
        summary = json.loads((manager.run_dir / SUMMARY).read_text())
        steps, origin = int(summary["steps"]), summary["origin"]
        is_done = steps >= trainer.max_steps
        if trainer.max_generated_tokens is not None:
            is_done |= summary["generated_tokens"] >= trainer.max_generated_tokens
        is_exported = summary["is_exported"] and (manager.run_dir / "hf").is_dir()
        before = dict(summary.get("settings", {}))  # a summary without them is taken as it is
    except (OSError, ValueError, KeyError, TypeError):
        return None
    explicit = manager.resume_from_checkpoint
    is_this_run = explicit is None or str(Path(explicit).resolve()) == origin
    if not (manager.resume_if_exists and is_this_run and is_done):
        return None
    if before and (changes := list(_changes(before, result_settings(config)))):
        more = f" and {len(changes) - _MAX_NAMED} more" if len(changes) > _MAX_NAMED else ""
        raise UserError(
            "exp_manager.name",
            manager.name,
            f"is a run of other settings, finished after {steps} steps: {', '.join(changes[:_MAX_NAMED])}{more}",
            f"set another exp_manager.name, or move {manager.run_dir}; a higher trainer.max_steps continues that run",
        )
    return steps if is_exported or not manager.export_hf else None


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a run's result depends on, by dotted field, as JSON.

    What lies on disk counts by its content, and may move: ``{"path": ..., "content": digest}``.
    """
    paths = {
        "policy.model_path": config.policy.model_path,
        "policy.tokenizer_path": config.policy.tokenizer_path,
        "eval.baseline": config.eval.baseline,
        "rollout.recorded_dir": config.rollout.recorded_dir,
        **stored_pools(config),
    }
    settings = dict(_fields(shown(config), ""))
    policy = config.policy
    folders = {"policy.model_path": policy.model_dir}
    if policy.tokenizer_path is not None:
        folders["policy.tokenizer_path"] = policy.tokenizer_dir
    for field, path in paths.items():
        folder = None if path is None else folders.get(field, Path(path))
        settings[field] = None if folder is None else {"path": path, "content": content_digest(folder)}
    reward = config.data.reward
    if reward is not None and (content := file_digest(reward)) is not None:
        settings["data.reward"] = {"path": reward, "content": f"{content} {reward.rpartition(':')[2]}"}
    settings = {field: value for field, value in settings.items() if not field.startswith("data.validation.")}
    settings["data.validation"] = None
    sets = {validation_key(name): files for name, files in config.data.held_out.items()}
    for field, files in {"data.train": config.data.train or [], **sets}.items():
        settings[field] = {"path": ", ".join(files), "content": rows_digest(files)}
    if (names := sorted(config.data.held_out)) not in ([], [""]):  # another list of sets is another run
        settings["data.validation"] = {"path": ", ".join(names), "content": ", ".join(names)}
    return json.loads(json.dumps(json_safe(settings), default=str))


def _fields(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        field = f"{prefix}{name}"
        if field in _MEGATRON:
            given = {key: inner for key, inner in value.items() if inner is not None}  # null leaves a field out
            yield field, {key: inner for key, inner in given.items() if not any(word in key for word in _LAYOUT)}
        elif field not in _NO_MATTER:
            yield from _fields(value, f"{field}.") if isinstance(value, Mapping) else [(field, value)]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Describe the fields that differ. One that only another version of the program has is none."""
    for field in (field for field in now if field in before):
        old, new = before[field], now[field]
        if isinstance(old, Mapping) and isinstance(new, Mapping) and "content" in old:
            if old["content"] != new["content"]:
                yield f"{field} had other content ({shortened(str(old['path']))})"
        elif old != new:
            old, new = (
                value["path"] if isinstance(value, Mapping) and "path" in value else value for value in (old, new)
            )
            yield f"{field} was {shortened(repr(old))}, not {shortened(repr(new))}"
