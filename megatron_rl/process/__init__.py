"""Processes: how they start, what they are at, how a hang is found, how they end. Imports nothing of the package."""
