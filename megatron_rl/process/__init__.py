"""Processes: start, activity, output, hangs and end. This room imports nothing of the package."""
