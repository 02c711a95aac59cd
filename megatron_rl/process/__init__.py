"""Processes: start, activity, hangs and end. This room imports nothing of the package."""
