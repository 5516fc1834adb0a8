"""Floor 10: the address of `scshards.train.compat`; what trains is in scshards.training."""
