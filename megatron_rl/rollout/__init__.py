"""Rollouts: the engine protocol, its implementations, and collection of scored groups. Never imports ``model``."""
