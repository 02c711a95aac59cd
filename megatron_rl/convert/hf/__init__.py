"""Hugging Face checkpoints: safetensors in and out, and the slices of them that a rank needs."""
