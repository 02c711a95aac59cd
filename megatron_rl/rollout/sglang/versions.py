"""Differences between SGLang releases, one entry a range. A server reports its version; an unknown one is refused."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.errors import UserError


@dataclass(frozen=True)
class Adapter:
    """The protocol of one range of releases."""

    first: tuple[int, int, int]
    last: tuple[int, int, int]
    has_update_session: bool
    """True if weight updates need begin_weight_update and end_weight_update around them."""
    has_token_versions: bool
    """True if replies carry the version of each token; else the request's version holds for all tokens."""


ADAPTERS = (
    Adapter((0, 5, 23), (0, 5, 23), has_update_session=True, has_token_versions=True),
    # 0.5.17 is what installs on the GPU machine's torch. Sources read and imported, not run.
    Adapter((0, 5, 11), (0, 5, 17), has_update_session=False, has_token_versions=False),
)


def adapter_for(version: str, url: str) -> Adapter:
    """Return the adapter for a server that reports this version.

    Raises:
        UserError: no adapter knows it.
    """
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    for adapter in ADAPTERS:
        if adapter.first <= numbers <= adapter.last:
            return adapter
    known = ", ".join(f"{_text(a.first)} - {_text(a.last)}" for a in ADAPTERS)
    raise UserError(
        "rollout.servers.urls",
        url,
        f"runs SGLang {version}; known are {known}",
        "start the server from requirements/sglang_cpu.txt or sglang_gpu.txt (or a known release)",
    )


def _text(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))
