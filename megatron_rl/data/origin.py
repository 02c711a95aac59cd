"""What a pool's trajectories depend on, as short digests: the tokenizer that cut them, the weights that sampled them.

Both have 16 hexadecimal digits and say whether two are the same wherever their files lie. They find mix-ups, not attackers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from megatron_rl.convert.digest import as_text, digest
from megatron_rl.convert.reader import HFReader
from megatron_rl.errors import UserError

Gather = Callable[[list[Any]], list[list[Any]]]
"""This rank's list -> the lists of all ranks, as ``parallel.agree.gather_json`` does it."""

_SPLITTING = ("normalizer", "pre_tokenizer", "model")
"""What decides in a tokenizers.Tokenizer which ids a text becomes, apart from the added tokens, which the vocabulary has."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Of a transformers tokenizer: vocabulary with added tokens, ids of special tokens, and how text is split.

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


def model_digest(
    directory: str | Path,
    *,
    random_seed: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Gather | None = None,
) -> str:
    """Of the weights in a Hugging Face directory: names, types, shapes and bits, however they are dealt out to files.

    Every rank reads its share, one tensor at a time.

    Args:
        directory: config.json and, unless ``random_seed`` is given, safetensors files.
        random_seed: of a model that starts from random weights and so has no files: the digest is of config.json and seed.
        rank: this rank.
        num_ranks: that share the work; all call with equal arguments.
        gather: gives each rank the lists of all; needed where there is more than one.

    Returns:
        16 hexadecimal digits, the same on every rank.

    Raises:
        UserError: there is no complete checkpoint, or no config.json.
    """
    directory = Path(directory)
    if random_seed is not None:
        return _hash([_config(directory), f"random/{random_seed}"])
    assert gather is not None or num_ranks == 1, "ranks that share the work need a gather"
    reader = HFReader(directory)
    # The largest first, dealt out in turn: ranks get about equally much.
    names = sorted(reader.names, key=lambda name: (-prod(reader.shape(name)), name))
    mine = [_fingerprint(reader, name) for name in names[rank::num_ranks]]
    shares = [mine] if gather is None else gather(mine)
    return _hash(sorted(fingerprint for share in shares for fingerprint in share))


def _fingerprint(reader: HFReader, name: str) -> list[Any]:
    """Name, type, shape and digest of one tensor."""
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
