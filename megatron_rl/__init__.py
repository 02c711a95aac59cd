"""Reinforcement-learning post-training on Megatron-Core. Importing this package changes nothing and imports no torch."""

__version__ = "0.1.0"
