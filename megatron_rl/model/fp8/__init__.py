"""Products in eight bits: which recipe runs where, and its arithmetic in plain torch for machines without such units."""
