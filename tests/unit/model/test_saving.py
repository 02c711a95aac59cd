"""A checkpoint that is written while training goes on holds what was there when it began, or all ranks hear why not."""

from __future__ import annotations

import json
import resource
import signal
import threading
import time
import weakref
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.errors import UserError
from tests.forked import run_ranks
from tests.parallel.invariance import config_of, num_ranks, recorded_batch
from tests.policy_case import build_policy
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_moe", tied=False, seed=3)


def held_writer() -> threading.Event:
    """Let writers wait for this event."""
    from megatron_rl.model import saving

    may_write, write = threading.Event(), saving.PendingSave._write

    def later(self: Any, files: list[Any]) -> None:
        may_write.wait()
        write(self, files)

    saving.PendingSave._write = later  # type: ignore[method-assign]
    return may_write


def written_behind(model: Path, samples: list, layout: dict, overrides: tuple[str, ...], directory: Path) -> Any:
    """Return the manifests of one moment, written at once and behind two updates, and the results of the polls."""
    from megatron_rl.algorithms.grpo import GRPO
    from megatron_rl.model.checkpoint import Checkpoints

    config = config_of(model, "policy.optim.lr=1e-2", *overrides, **layout)
    policy = build_policy(config)
    loss, rank = GRPO(config).loss, policy.groups.rank
    policy.train_step(samples, loss)
    at_once = Checkpoints(directory / "at_once", keep_last=9, groups=policy.groups, say=print)
    path = at_once.save(1, policy.trainable, {"step": 1}, {"kept": torch.ones(3)})
    behind = Checkpoints(directory / "behind", keep_last=9, groups=policy.groups, say=print)
    may_write = held_writer()
    behind.start(1, policy.trainable, {"step": 1}, {"kept": torch.ones(3)})
    if rank == 0:  # this one writes, the others wait
        may_write.set()
    polled = []
    for _ in range(2):
        policy.train_step(samples, loss)
        if policy.groups.world_size > 1:
            polled.append(behind.poll())
    assert not (directory / "behind" / path.name).exists() or policy.groups.world_size == 1
    may_write.set()
    while (found := behind.poll()) is None:
        time.sleep(0.01)
    assert behind.poll() is None and behind.complete() is None
    assert behind.take_metrics().keys() == {"time/checkpoint_s", "checkpoint/write_s"}
    manifests = [json.loads((each / "manifest.json").read_text())["files"] for each in (path, found)]
    behind.load(found, policy.trainable)
    return manifests, polled


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ({"tp": 1}, ()),
        ({"dp": 2}, ("trainer.precision=bf16", "policy.megatron_cfg.expert_model_parallel_size=2")),
        ({"tp": 2, "sp": True}, ()),
        ({"pp": 2}, ()),
    ],
    ids=str,
)
def test_what_is_written_is_what_was_there_when_it_began(
    model: Path, tmp_path: Path, layout: dict, overrides: tuple[str, ...]
) -> None:
    samples = recorded_batch(model)
    for (at_once, behind), polled in run_ranks(
        written_behind, num_ranks(layout), model, samples, layout, overrides, tmp_path
    ):
        assert len(at_once) > 5 and at_once.keys() == behind.keys()
        others = [name for name, entry in at_once.items() if behind[name] != entry]
        assert others == ["model/.metadata"], "which has the folder's name in it"
        assert all(found is None for found in polled), "one rank had not written"


def not_written(model: Path, directory: Path) -> Any:
    """Let rank 1 write no file as large as its shard; return the error, the files left, and a later save."""
    from megatron_rl.model.checkpoint import Checkpoints

    policy = build_policy(config_of(model, tp=2))
    checkpoints = Checkpoints(directory, keep_last=9, groups=policy.groups, say=print)
    checkpoints.save(1, policy.trainable, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    may_write = held_writer()
    checkpoints.start(2, policy.trainable, {"step": 2})
    if policy.groups.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    may_write.set()
    with pytest.raises(UserError) as error:
        checkpoints.complete()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()
    left = sorted(path.name for path in directory.iterdir())
    torch.distributed.barrier()  # the other rank has looked, before the next folder is begun
    checkpoints.start(3, policy.trainable, {"step": 3})
    return str(error.value), left, checkpoints.complete()


def test_a_rank_that_cannot_write_tells_all(model: Path, tmp_path: Path) -> None:
    first, second = run_ranks(not_written, 2, model, tmp_path)
    assert first == second
    error, left, last = first
    assert "File too large" in error, error
    assert "earlier checkpoints are intact" in error
    assert left == ["step_00000001"] and last.name == "step_00000003"


def freed(model: Path, directory: Path) -> bool:
    """True if the copies are gone while files are read back for their digests."""
    from megatron_rl.model import saving

    policy = build_policy(config_of(model, tp=1))
    copies, digest, alive = [], saving.entry_of, []
    on_host = saving._on_host

    def kept(request: Any, *, is_copied: bool) -> list[Any]:
        files = on_host(request, is_copied=is_copied)
        copies.extend(weakref.ref(tensor) for *_, (_, tensors) in files for _, tensor in tensors)
        return files

    def entry_of(path: Path) -> dict[str, Any]:
        if path.suffix == ".distcp":
            alive.append(sum(copy() is not None for copy in copies))
        return digest(path)

    saving._on_host, saving.entry_of = kept, entry_of
    saving.PendingSave(directory / "x", policy.trainable, policy.groups, {}, {}, is_background=True).complete()
    assert copies and alive
    return not any(alive)


def test_copies_are_freed_as_soon_as_they_are_written(model: Path, tmp_path: Path) -> None:
    assert run_ranks(freed, 1, model, tmp_path) == [True]


def ended_by_an_error(
    model: Path, directory: Path, who: tuple[int, ...], is_taken: bool
) -> tuple[list[str], list[str]]:
    """End some of two ranks by an error while a checkpoint is written; return the files they leave and the lines they say."""
    from megatron_rl.model import checkpoint

    checkpoint.TOGETHER_S = 1.0
    policy, said = build_policy(config_of(model, tp=2)), []

    def check_owner() -> None:
        if is_taken and policy.groups.rank == 0:
            raise UserError("exp_manager.exp_dir", None, "was taken over", "leave it")

    checkpoints = checkpoint.Checkpoints(
        directory, keep_last=9, groups=policy.groups, say=said.append, check_owner=check_owner
    )
    checkpoints.complete_at_error()
    checkpoints.start(1, policy.trainable, {"step": 1})
    if policy.groups.rank in who:
        checkpoints.complete_at_error()
    return [path.name for path in directory.iterdir()], said


def test_a_run_that_ends_by_an_error_completes_what_is_being_written(model: Path, tmp_path: Path) -> None:
    for left, said in run_ranks(ended_by_an_error, 2, model, tmp_path / "together", (0, 1), False):
        assert left == ["step_00000001"] and "step_00000001" in said[-1]
    left, said = run_ranks(ended_by_an_error, 2, model, tmp_path / "alone", (0,), False)[0]
    assert left == ["step_00000001.tmp"] and "is lost: not all ranks" in said[-1]


def test_a_folder_that_is_another_runs_by_now_gets_no_checkpoint(model: Path, tmp_path: Path) -> None:
    for left, said in run_ranks(ended_by_an_error, 2, model, tmp_path, (0, 1), True):
        assert left == ["step_00000001.tmp"] and "is lost: exp_manager.exp_dir: was taken over" in said[-1]


def test_a_run_completes_its_checkpoint_before_its_parts_are_stopped() -> None:
    from megatron_rl.run import Run

    for error, expected in ((UserError("a", None, "b", "c"), ["completed", "closed"]), (ValueError(), ["closed"])):
        happened: list[str] = []
        run = Run.__new__(Run)
        run.checkpoints = SimpleNamespace(complete_at_error=partial(happened.append, "completed"))  # type: ignore[assignment]
        run._parts = ExitStack()
        run._parts.callback(happened.append, "closed")
        with pytest.raises(type(error)), run:
            raise error
        assert happened == expected


def test_too_little_main_memory_is_no_full_disk(tmp_path: Path) -> None:
    from megatron_rl.model.saving import as_user_error

    with pytest.raises(UserError, match=r"needs main memory .*you tried to allocate"), as_user_error(tmp_path):
        torch.empty(2**50, dtype=torch.uint8)


def beats(model: Path, directory: Path, is_writing: bool) -> int:
    """Count the signs of work while a checkpoint is waited for during a second."""
    from megatron_rl.model import saving
    from megatron_rl.process import activity

    policy = build_policy(config_of(model, tp=1))
    may_write = held_writer()
    if is_writing:
        saving.num_written = time.monotonic_ns  # type: ignore[assignment]
    pending = saving.PendingSave(directory / "x", policy.trainable, policy.groups, {}, {}, is_background=True)
    threading.Timer(1.0, may_write.set).start()
    before = activity.current().progress
    pending.complete()
    return activity.current().progress - before


def test_waiting_is_work_only_while_something_is_written(model: Path, tmp_path: Path) -> None:
    assert run_ranks(beats, 1, model, tmp_path, True)[0] >= 4
    assert run_ranks(beats, 1, model, tmp_path, False)[0] <= 2


def tensor_of_its_own(directory: Path) -> float:
    """Return the mean that is written of a tensor that changes meanwhile and is no view: Megatron copies only views."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_rl.model import saving

    rows = torch.ones(4, 4)
    state = {"rows": ShardedTensor.from_rank_offsets("rows", rows)}
    request = dist_checkpointing.save(state, str(directory), async_sharded_save=True, **saving._strategy())
    files = saving._on_host(request, is_copied=True)
    rows.zero_()
    rank, _, results = request.async_fn_args
    request.async_fn(rank, files, results)
    for finalize in request.finalize_fns:
        finalize()
    return dist_checkpointing.load(state, str(directory))["rows"].mean().item()


def test_a_tensor_is_copied_whoever_owns_its_memory(tmp_path: Path) -> None:
    assert run_ranks(tensor_of_its_own, 1, tmp_path) == [1.0]
