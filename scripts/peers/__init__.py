"""Peers: the algorithms of stable-baselines3 on the same environments, steps and evaluation."""
