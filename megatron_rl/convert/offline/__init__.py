"""Resumable conversion of whole checkpoints in files, for ``megatron-rl convert``."""
