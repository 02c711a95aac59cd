"""Trees and chains of rollouts for people: written by a run, read by a browser."""
