"""How good the policy is: held-out accuracy, pass@k, kept and new solutions, styles, distance from its start."""
