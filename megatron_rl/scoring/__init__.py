"""Turns responses into scores: the pool of worker processes that run them, and the collective around it."""
