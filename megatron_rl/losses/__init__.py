"""Objectives: per-token terms, and the weights that aggregate them. Pure functions; they know no process group.

The trainer's loss is ``sum over tokens of weight * term``; nothing downstream divides again.
"""
