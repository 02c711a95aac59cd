"""Quality of the policy: held-out accuracy, pass@k, kept and new solutions, styles, distance from its start."""
