"""Command line of one server: the settings of this project, then those that the config passes through."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.errors import UserError
from megatron_rl.rollout.sglang_server import KEY_VARIABLE, MEETING_VARIABLE

CPU_KV_TOKENS = 65_536
"""KV pool of a CPU server unless the config says otherwise: SGLang's own default is most of the machine's memory."""

WEIGHT_LOADER = "megatron_rl.weight_sync.receiver.load"
"""Our weight loader inside a server's ranks. Only the server imports it."""

_CPU = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "max_total_tokens": CPU_KV_TOKENS,
    "sleep_on_idle": True,  # an idle scheduler would spin on a core that the trainer needs
}


@dataclass(frozen=True)
class ServerPart:
    """One node's share of a server that spreads over several."""

    index: int
    """0 is the one that answers requests."""
    num_parts: int
    meeting: str
    """``host:port`` on the first node, where the parts meet."""


def server_command(
    passed: Mapping[str, Any],
    *,
    model_path: str,
    dtype: torch.dtype,
    records_experts: bool = False,
    overrides: Mapping[str, Any] | None = None,
    is_cpu: bool,
    host: str,
    port: int,
    base_gpu_id: int,
    releases_memory: bool,
    seed: int,
    part: ServerPart | None = None,
) -> list[str]:
    """Return program and arguments of a server.

    Args:
        passed: ``rollout.sglang_cfg``; wins over our defaults.
        model_path: Hugging Face directory with config.json and tokenizer.
        dtype: of the trainer's weights; SGLang's ``auto`` would choose float16 for a float32 model.
        records_experts: completions carry the chosen experts.
        overrides: fields of config.json.
        is_cpu: no GPU here.
        host, port: where to listen.
        base_gpu_id: first GPU.
        releases_memory: the trainer wants the memory between rollouts.
        seed: of this server.
        part: of a server over several nodes.
    """
    settings: dict[str, Any] = {
        "model_path": model_path,
        "host": host,
        "port": port,
        "dtype": str(dtype).removeprefix("torch."),
        # Weights come from the trainer before the first request; reading them from disk would only cost time.
        "load_format": "dummy",
        "weight_version": "none",
        "custom_weight_loader": [WEIGHT_LOADER],
        "skip_server_warmup": True,
        "grammar_backend": "none",
        "random_seed": seed,
        "log_level_http": "warning",
        "enable_return_routed_experts": records_experts,
        "json_model_override_args": json.dumps(overrides) if overrides else None,
    }
    if is_cpu:
        settings |= _CPU
    else:
        settings |= {"base_gpu_id": base_gpu_id, "enable_memory_saver": releases_memory}
    if part is not None:
        settings |= {"nnodes": part.num_parts, "node_rank": part.index, "dist_init_addr": part.meeting}
    settings |= passed
    return [sys.executable, "-P", "-m", "megatron_rl.rollout.sglang_server", *_arguments(settings)]


def server_environment(
    *,
    key: str,
    port: int,
    meeting: Path,
    is_cpu: bool,
    tensor_parallel_size: int,
    num_servers: int,
    num_cores: int,
    part: ServerPart | None = None,
) -> dict[str, str]:
    """Return the environment variables of one server's processes.

    Args:
        key: that every request but that for its health needs.
        port: where it listens.
        meeting: file that is not there yet, in a folder that only this user sees. Tensor-parallel ranks meet in it: what SGLang
            does by default, a store that listens on a port, believes whoever comes first.
        is_cpu: no GPU here.
        tensor_parallel_size: of the server.
        num_servers: on this machine.
        num_cores: of this machine.
        part: of a server over several nodes; its ranks meet at a port.
    """
    # SGLang calls ninja by its name, which an environment that is not activated does not find.
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {KEY_VARIABLE: key, "PATH": programs}
    if part is None:
        environment[MEETING_VARIABLE] = f"file://{meeting}"
    # SGLang's shared memory between ranks on a CPU has these two in its name.
    host, _, number = (part.meeting if part else f"127.0.0.1:{port}").rpartition(":")
    environment |= {"MASTER_ADDR": host, "MASTER_PORT": number}
    if not is_cpu:
        return environment
    # One core of a server's share is for its HTTP process. Waiting threads sleep, because spinning ones would take cores
    # from the threads that they wait for.
    threads = (num_cores // num_servers - 1) // tensor_parallel_size
    environment |= {"OMP_NUM_THREADS": str(max(1, threads)), "OMP_WAIT_POLICY": "passive"}
    if tensor_parallel_size > 1:  # by default SGLang wants a NUMA node a rank
        cores = [str(rank % num_cores) for rank in range(tensor_parallel_size)]
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(cores)
    return environment


def check_kv_pool(passed: Mapping[str, Any], *, is_cpu: bool, longest_request: int) -> None:
    """Raise ``UserError`` if a prompt with its response could never fit the KV pool."""
    tokens = passed.get("max_total_tokens", CPU_KV_TOKENS if is_cpu else None)
    if tokens is not None and int(tokens) <= longest_request:
        raise UserError(
            "rollout.sglang_cfg.max_total_tokens",
            tokens,
            f"the longest prompt with rollout.max_new_tokens has {longest_request} tokens, which must fit",
            "raise it",
        )


def _arguments(settings: Mapping[str, Any]) -> list[str]:
    """Turn ``{"tp_size": 2, "sleep_on_idle": True}`` into ``--tp-size 2 --sleep-on-idle``; False and None give no flag."""
    arguments: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        arguments += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    return arguments
