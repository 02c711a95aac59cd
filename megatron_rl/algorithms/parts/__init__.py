"""Parts of methods, each with one concern: rollouts, selection of tokens, credit, objective, stored rows."""
