"""From responses to scores: verifiers, the pool of worker processes that run them, and the collective around it."""
