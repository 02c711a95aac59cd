"""Reports of a finished run: curves, the summary, and trees of rollouts as a page for the browser."""
