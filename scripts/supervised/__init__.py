"""What ``scripts.supervised`` is made of: data, networks, optimizers, campaign and report."""
