"""Client of one SGLang server over HTTP. Only this module knows the server's field names and errors."""

from __future__ import annotations

import asyncio
import base64
import math
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import torch
from torch import Tensor

from megatron_rl.rollout.sglang.versions import Adapter
from megatron_rl.types import Completion, FinishReason, Request

UPDATING = "updating"
"""Version stamp of a server whose weights are being replaced; no completion with it is ever accepted."""


class Unavailable(Exception):
    """No usable reply: the server is gone, late, or failed inside. A retry may work."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        """Name for the metrics: ``connection``, ``timeout``, ``server_error``, ``cut``, ``bad_reply``, ``stale``."""


class Refused(Exception):
    """A refusal by the server (HTTP 4xx); a retry is of no use."""


class Unauthorized(Refused):
    """A refusal for want of the right key."""


class SGLangClient:
    """Client of one server. Methods raise ``Unavailable`` or ``Refused`` and nothing else."""

    def __init__(self, url: str, session: aiohttp.ClientSession, *, key: str | None) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.num_prompt_tokens = 0
        """Prompt tokens of the completions so far."""
        self.num_cached_tokens = 0
        """Prompt tokens among these that the server had in its prefix cache."""

    # ------------------------------------------------------------------------------------------------ generation

    async def generate(
        self,
        request: Request,
        *,
        stop_ids: Sequence[int],
        experts: tuple[int, int] | None = None,
        adapter: Adapter,
        version: int,
        timeout_s: float,
    ) -> Completion:
        """Complete one request, and check that the reply is whole and from the wanted weights.

        ``experts`` (layers, experts per token) asks the server to return the chosen experts.
        """
        body = {
            "input_ids": request.prompt_ids.tolist(),
            "sampling_params": {
                "max_new_tokens": request.max_new_tokens,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "top_k": request.top_k or -1,
                "stop_token_ids": list(stop_ids),
            },
            "return_logprob": True,
            "return_routed_experts": experts is not None,
        }
        reply = await self._post("/generate", body, timeout_s)
        try:
            completion = _completion(reply, request, adapter, version, stop_ids)
            self.num_prompt_tokens += len(request.prompt_ids)
            self.num_cached_tokens += int(reply["meta_info"].get("cached_tokens", 0))
            return completion if experts is None else replace(completion, experts=_experts(reply, request, experts))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Unavailable("bad_reply", f"{self.url} sent a reply that cannot be read ({error!r})") from error

    # ------------------------------------------------------------------------------------------------ state

    async def weight_version(self, timeout_s: float) -> str:
        """Return the server's version stamp of its weights."""
        return str((await self._get("/model_info", timeout_s)).get("weight_version"))

    async def info(self, timeout_s: float) -> dict[str, Any]:
        """Return SGLang's version, arguments and model, to be checked before the first request."""
        return {**await self._get("/server_info", timeout_s), **await self._get("/model_info", timeout_s)}

    async def check_health(self, timeout_s: float) -> None:
        """Check that the scheduler responds, not only the HTTP process."""
        await self._call("GET", "/health", None, timeout_s)

    async def release_memory(self, timeout_s: float) -> None:
        """Release weights and KV cache until ``resume_memory``; the weights must be sent again.

        A server that is not idle dies of this, so nothing else may be requested meanwhile, not even its health.
        """
        await self._flush_cache(timeout_s, patience_s=timeout_s)
        await self._post("/release_memory_occupation", {}, timeout_s)

    async def resume_memory(self, timeout_s: float) -> None:
        """Take back the memory of ``release_memory``."""
        await self._post("/resume_memory_occupation", {}, timeout_s)

    # ------------------------------------------------------------------------------------------------ weights

    async def begin_update(self, version: int, *, pause_mode: str, adapter: Adapter, timeout_s: float) -> None:
        """Pause generation, and stamp the weights as neither old nor new."""
        await self._post("/pause_generation", {"mode": pause_mode}, timeout_s)
        await self._stamp(f"{UPDATING}:{version}", timeout_s)
        if not adapter.has_update_session:
            return
        try:
            await self._post("/begin_weight_update", {}, timeout_s)
        except Refused:  # a trainer that died in mid-update has left its session open; all weights are sent anew
            await self._post("/end_weight_update", {}, timeout_s)
            await self._post("/begin_weight_update", {}, timeout_s)

    async def send(
        self, bucket: str, *, tensor_parallel_size: int, loader: str | None = None, timeout_s: float
    ) -> None:
        """Give one bucket of tensors to every tensor-parallel rank.

        Args:
            bucket: as ``serialize`` makes it.
            tensor_parallel_size: of the server.
            loader: function that takes the bucket inside the ranks; None means whole tensors, and each rank loads its part.
            timeout_s: deadline.
        """
        # The cache is flushed once, in end_update.
        body = {
            "serialized_named_tensors": [bucket] * tensor_parallel_size,
            "load_format": loader,
            "flush_cache": False,
        }
        await self._post("/update_weights_from_tensor", body, timeout_s)

    async def load_checkpoint(self, path: str, *, timeout_s: float) -> None:
        """Load a Hugging Face checkpoint that the server finds under this path."""
        # Our servers start with load_format dummy, which would be the default here, too.
        body = {"model_path": path, "load_format": "auto", "flush_cache": False}
        await self._post("/update_weights_from_disk", body, timeout_s)

    async def end_update(
        self, version: int, *, pause_mode: str, adapter: Adapter, timeout_s: float, patience_s: float
    ) -> None:
        """Drop the prefix cache of the old weights, stamp the new version, resume, and check the stamp.

        ``patience_s`` is the limit of the wait for an idle server, ``timeout_s`` that of each answer.
        """
        if adapter.has_update_session:
            await self._post("/end_weight_update", {}, timeout_s)
        try:
            await self._flush_cache(timeout_s, patience_s=0.0 if pause_mode == "in_place" else patience_s)
        except Refused:
            if pause_mode != "in_place":  # in_place: paused requests still need the cache, and the server keeps it
                raise
        await self._stamp(str(version), timeout_s)
        await self._post("/continue_generation", {}, timeout_s)
        if (stamp := await self.weight_version(timeout_s)) != str(version):
            raise Refused(f"{self.url} says its weights are version {stamp} after an update to {version}")

    async def _flush_cache(self, timeout_s: float, *, patience_s: float) -> None:
        """Drop the prefix cache. A server refuses this while requests are running, so wait until it is idle."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                await self._post("/flush_cache", {}, timeout_s)
                return
            except Refused:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)

    async def _stamp(self, version: str, timeout_s: float) -> None:
        await self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False}, timeout_s)

    # ------------------------------------------------------------------------------------------------ HTTP

    async def _get(self, path: str, timeout_s: float) -> Any:
        return await self._call("GET", path, None, timeout_s)

    async def _post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> Any:
        return await self._call("POST", path, body, timeout_s)

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self.url + path, json=body, headers=self._headers, timeout=timeout
            ) as response:
                if response.status >= 500:
                    raise Unavailable("server_error", f"{self.url}{path}: {response.status} {await _text(response)}")
                if response.status >= 400:
                    kind = Unauthorized if response.status in (401, 403) else Refused
                    raise kind(f"{self.url}{path}: {response.status} {await _text(response)}")
                if response.content_type == "application/json":
                    return await response.json()
                return await response.text()
        except TimeoutError as error:
            raise Unavailable("timeout", f"{self.url}{path} did not answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unavailable("connection", f"{self.url}{path}: {type(error).__name__} {error}") from error


def serialize(named_tensors: Sequence[tuple[str, Tensor]]) -> str:
    """Return a bucket as SGLang reads it: a plain pickle in base64. Its own shared-memory pickles kill a CPU server."""
    return base64.b64encode(pickle.dumps([(name, tensor.cpu()) for name, tensor in named_tensors], protocol=4)).decode()


def _experts(reply: Any, request: Request, shape: tuple[int, int]) -> Tensor:
    """Decode the chosen experts, [P + R - 1, layers, k] int16, from int32 in base64."""
    flat = torch.frombuffer(bytearray(base64.b64decode(reply["meta_info"]["routed_experts"])), dtype=torch.int32)
    whole = (len(request.prompt_ids) + len(reply["output_ids"]) - 1, *shape)
    if flat.numel() != math.prod(whole):
        raise ValueError(f"{flat.numel()} numbers of experts instead of {whole}")
    return flat.view(whole).to(torch.int16)


async def _text(response: aiohttp.ClientResponse) -> str:
    return " ".join((await response.text()).split())[:500]


def _completion(reply: Any, request: Request, adapter: Adapter, version: int, stop_ids: Sequence[int]) -> Completion:
    meta = reply["meta_info"]
    kind = (meta["finish_reason"] or {}).get("type")
    if kind == "abort":
        raise Unavailable("cut", f"the server ended a completion early: {meta['finish_reason']}")
    versions = {meta["weight_version"]}
    if adapter.has_token_versions:
        versions |= {span["version"] for span in meta["weight_versions"]}
    if versions != {str(version)}:
        raise Unavailable("stale", f"a completion comes from weights {sorted(versions)} instead of {version}")
    response_ids = torch.tensor(reply["output_ids"], dtype=torch.int32)
    pairs = meta["output_token_logprobs"]
    # "stop" is a stop token, which is part of the ids. Before 0.5.23 a response that ends with one exactly at the limit is
    # reported as "length"; it is whole, and nothing may continue it.
    is_ended = kind == "stop" or (len(response_ids) > 0 and int(response_ids[-1]) in stop_ids)
    finish_reason: FinishReason = "stop" if is_ended else "length"
    counts = {len(response_ids), len(pairs), int(meta["completion_tokens"])}
    is_whole = len(counts) == 1 and 0 < len(response_ids) <= request.max_new_tokens
    if not is_whole or [pair[1] for pair in pairs] != reply["output_ids"]:
        raise ValueError(
            f"{len(response_ids)} ids, {len(pairs)} log-probs, {meta['completion_tokens']} tokens counted, "
            f"{request.max_new_tokens} asked for at most"
        )
    if finish_reason == "length" and len(response_ids) != request.max_new_tokens:
        raise ValueError(f"{len(response_ids)} tokens, and the reason is length, not {request.max_new_tokens}")
    log_probs = torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)
    if not bool(log_probs.isfinite().all()):
        raise ValueError("a log-prob is not finite")
    return Completion(response_ids, log_probs, finish_reason, version)
