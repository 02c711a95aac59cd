"""What a run looks like afterwards: curves, the summary, and trees of rollouts as a page for the browser."""
