"""Compare a converted checkpoint with its original: one forward of both, in float32, on the CPU."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from megatron_rl.errors import UserError

BOUND = 1e-3
"""Limit of the largest log-prob difference, in float32: sums in another order give some 1e-5, a wrong tensor about 1."""
_NUM_TOKENS = 64
_CONFIG = """
trainer: {stage: sft, devices: 1, precision: fp32, max_steps: 1, accelerator: cpu}
exp_manager: {exp_dir: unused, name: unused}
policy: {model_path: "???", optim: {lr: 1.0e-3}, train_global_batch_size: 1, train_micro_batch_tokens: 64}
algorithm: {name: sft}
data: {task: gsm8k, train: unused}
"""


def bytes_of_forward(num_elements: int) -> int:
    """Return the bytes that the comparison needs: one model after the other, and a copy while it is loaded."""
    return 2 * 4 * num_elements


def fits(num_elements: int) -> bool:
    """Return True if this machine now has the memory, with a quarter to spare."""
    return bytes_of_forward(num_elements) < 0.75 * psutil.virtual_memory().available


def compare_forward(hf_directory: str | Path, megatron_directory: str | Path) -> float:
    """Return the largest log-prob difference of any token between transformers and our Megatron model.

    Both models are float32 and see the same random tokens; the Megatron one, on a single rank, is filled by Megatron's own
    ``dist_checkpointing.load``. It runs in its own process, so that this one has no process group afterwards.

    Args:
        hf_directory: a Hugging Face checkpoint, with weights.
        megatron_directory: with ``.metadata`` in it, of the same model.

    Raises:
        UserError: the comparison itself failed.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(hf_directory), str(megatron_directory), folder)
        try:
            start_processes(_compare, arguments, nprocs=1, start_method="spawn")
        except (ProcessExitedException, ProcessRaisedException) as error:
            lines = [line for line in str(error).strip().splitlines() if line.strip()]
            raise UserError(
                str(megatron_directory),
                None,
                f"the forward of both models failed: {lines[-1]}",
                "see the message above",
            ) from error
        return float((Path(folder) / "difference").read_text())


def _compare(_rank: int, hf_directory: str, megatron_directory: str, folder: str) -> None:
    import warnings

    import torch

    import megatron_rl.patches

    warnings.filterwarnings("ignore")  # our users cannot act on what upstream packages lack or deprecate
    megatron_rl.patches.apply("cpu")
    from megatron_rl.convert.architecture.shape import read_shape

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, read_shape(hf_directory).vocab_size, (_NUM_TOKENS,), generator=generator)
    with torch.no_grad():
        true = _hf_log_probs(hf_directory, tokens)
        found = _megatron_log_probs(hf_directory, megatron_directory, tokens, Path(folder))
    difference = (found - true).abs().nan_to_num(nan=float("inf")).max()
    (Path(folder) / "difference").write_text(str(float(difference)))


def _hf_log_probs(directory: str, tokens: Any) -> Any:
    """Return the log-probs [T - 1] float32 of each token but the first."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    log_p = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, tokens[1:, None])[:, 0]


def _megatron_log_probs(hf_directory: str, megatron_directory: str, tokens: Any, folder: Path) -> Any:
    import torch.distributed as dist

    from megatron_rl.config import load_config
    from megatron_rl.config.reader import quoted
    from megatron_rl.model.torch_dist import log_probs_of_one_rank

    (folder / "config.yaml").write_text(_CONFIG)
    config = load_config(folder / "config.yaml", [f"policy.model_path={quoted(hf_directory)}"])
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=10))
    found = log_probs_of_one_rank(config, megatron_directory, tokens)
    dist.destroy_process_group()
    return found
