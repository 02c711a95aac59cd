"""Prompts in order, and rows packed into micro-batches."""
