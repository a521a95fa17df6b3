"""What ``scripts/supervised.py`` is made of: data, networks, optimizers, campaign and report."""
