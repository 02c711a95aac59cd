"""From responses to scores: the pool of worker processes that can be killed, and the collective around it."""
