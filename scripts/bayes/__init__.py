"""Bayesian networks beside each other: regression, bound, classification, active learning."""
