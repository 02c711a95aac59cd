"""Weight updates through a shared directory, for servers that the trainer reaches by no process group.

    trainer    DiskPublisher.publish            -> DIRECTORY/00000007.full, 00000008.delta, 00000009.delta, ...
    server     apply(DIRECTORY, BASE, 9)        -> a Hugging Face checkpoint of version 9, beside BASE
               POST /update_weights_from_disk      with its path

A link is a directory with ``data`` and ``manifest.json``, whole or not there. A full link holds the bits of every tensor; a
delta holds the exclusive or with those of the version before (frames.py), a few hundredths of the size. The manifest has
each tensor's digest before and after, so that a chain of links proves itself: a missing, damaged or misplaced link is found
before anything is put in place.
"""

from megatron_rl.weight_sync.disk.links import remove_newer, remove_older
from megatron_rl.weight_sync.disk.restore import apply
from megatron_rl.weight_sync.disk.write import DiskPublisher, write_delta, write_full

__all__ = ["DiskPublisher", "apply", "remove_newer", "remove_older", "write_delta", "write_full"]
