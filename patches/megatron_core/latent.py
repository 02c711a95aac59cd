"""Build multi-head latent attention without Transformer Engine.

Why: its constructor asks ``isinstance(layer, TELinear)`` wherever ``HAVE_TE`` is true. The module that defines ``TELinear``
    imports without Transformer Engine too and puts a stand-in, which is not a class, in its place; ``HAVE_TE``, set by
    that import, is true all the same: TypeError for every model with latent attention.
Upstream: ``HAVE_TE`` and ``MultiLatentAttention.__init__`` in megatron/core/transformer/multi_latent_attention.py
Versions: 0.16.1 - 0.19.2 (tested on 0.16.1 and 0.19.2)
Remove when: ``HAVE_TE`` there comes from megatron/core/extensions/transformer_engine.py, where it is right.
Tested by: tests/unit/patches/test_patch_latent.py
"""

from __future__ import annotations

from .upstream import require


def apply() -> None:
    """Say that Transformer Engine is not there where it is not."""
    from megatron.core.transformer import multi_latent_attention

    require(multi_latent_attention, "HAVE_TE")
    if not isinstance(require(multi_latent_attention, "TELinear"), type):
        multi_latent_attention.HAVE_TE = False
