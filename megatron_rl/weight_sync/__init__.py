"""The only place where ``model`` and ``rollout`` meet: trained weights become the weights that sample."""
