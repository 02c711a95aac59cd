"""Weight sync: trained weights become the weights that sample. Only here do ``model`` and ``rollout`` meet."""
