"""Digests of a pool's origin: the tokenizer that cut its trajectories, the weights that sampled them.

Both have 16 hexadecimal digits and say whether two are the same wherever their files lie. They find mix-ups, not attackers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from megatron_rl.convert.hf.reader import HFReader
from megatron_rl.convert.tables.digest import as_text, digest
from megatron_rl.errors import UserError

_SPLITTING = ("normalizer", "pre_tokenizer", "model")
"""Parts of a tokenizers.Tokenizer that decide which ids a text becomes; added tokens are in the vocabulary."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the digest of a transformers tokenizer: vocabulary with added tokens, special ids, and splitting of text.

    Chat template, padding and truncation do not count: they change no id of a text. Nor does the post-processor, which may
    put a special token in front: prompts are stored as ids.
    """
    parts: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {name: tokenizer.convert_tokens_to_ids(text) for name, text in tokenizer.special_tokens_map.items()},
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts["splitting"] = {name: backend[name] for name in _SPLITTING}
    return _hash(parts)


def model_digest(directory: str | Path) -> str:
    """Return the digest of a directory's weights: names, types, shapes and bits, however they are spread over files.

    Returns:
        16 hexadecimal digits.

    Raises:
        UserError: there is no complete checkpoint.
    """
    return digest_of_fingerprints([weight_fingerprints(directory)])


def weight_fingerprints(directory: str | Path, *, rank: int = 0, num_ranks: int = 1) -> list[Any]:
    """Compute one rank's share of ``model_digest``, one tensor at a time; no collective.

    Args:
        directory: config.json and safetensors files.
        rank: this rank.
        num_ranks: that share the work.

    Returns:
        JSON, for ``digest_of_fingerprints``.

    Raises:
        UserError: there is no complete checkpoint.
    """
    reader = HFReader(Path(directory))
    # The largest first, dealt out in turn: ranks get about equally much.
    names = sorted(reader.names, key=lambda name: (-prod(reader.shape(name)), name))
    return [_fingerprint(reader, name) for name in names[rank::num_ranks]]


def digest_of_fingerprints(shares: Sequence[list[Any]]) -> str:
    """Return ``model_digest`` from the shares of all ranks, in any order."""
    return _hash(sorted(fingerprint for share in shares for fingerprint in share))


def random_model_digest(directory: str | Path, seed: int) -> str:
    """Return the digest of a model with random weights, which has no files: that of config.json and seed.

    Raises:
        UserError: there is no config.json.
    """
    return _hash([_config(Path(directory)), f"random/{seed}"])


def _fingerprint(reader: HFReader, name: str) -> list[Any]:
    """Return name, type, shape and digest of one tensor."""
    tensor = reader.read(name)
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    block = tensor.reshape(1) if tensor.dim() == 0 else tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
    return [name, dtype, shape, as_text(digest(name, block, (0,) * block.dim(), tuple(block.shape)))]


def _config(directory: Path) -> Any:
    path = directory / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), None, f"cannot be read ({error})", "give a Hugging Face model directory") from error


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
