"""Whole checkpoints from one format to another, in files, resumable: what ``megatron-rl convert`` and ``verify`` run."""
